"""RMSNorm under tensor and sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` over the last dimension, in fp32 whatever the dtype of ``x`` (arXiv 1910.07467).

    ``zero_centered`` (None: as ``config.layernorm_zero_centered_gamma`` says): the scale is ``1 + weight``, formed in fp32
    since bf16 cannot hold ``1 + 0.003``, and the weight starts at zero. Otherwise it is the weight, which starts at one.
    megatron-core's own norms need Transformer Engine or Apex for the first form or for sequence parallelism.

    ``per_head``: the norm of queries or keys. Each tensor-parallel rank sees its own heads, so the gradient is partial
    over the group (``grad_partial_over_tp``). Elsewhere it is so only under sequence parallelism (megatron's
    ``sequence_parallel``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        per_head: bool = False,
        zero_centered: bool | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma if zero_centered is None else zero_centered
        start = 0.0 if self.zero_centered else 1.0
        self.weight = nn.Parameter(torch.full((hidden_size,), start, dtype=config.params_dtype))
        self.weight.init_value = start  # type: ignore[attr-defined]
        self.weight.sequence_parallel = config.sequence_parallel and not per_head  # type: ignore[attr-defined]
        self.weight.grad_partial_over_tp = per_head and config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape and dtype."""
        weight = self.weight.float()
        scale = 1 + weight if self.zero_centered else weight
        return F.rms_norm(x.float(), weight.shape, scale, self.eps).to(x.dtype)
