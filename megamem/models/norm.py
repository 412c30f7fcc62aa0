"""Zero-centred RMSNorm under tensor and sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / rms(x) * (1 + weight)`` over the last dimension, in fp32 whatever the dtype of ``x``.

    The weight starts at zero and keeps the model's dtype; ``1 + weight`` is formed in fp32, since bf16 cannot hold
    ``1 + 0.003``. megatron-core's own norms need Transformer Engine or Apex for this form or for sequence parallelism.

    ``per_head``: the norm of queries or keys. Each tensor-parallel rank sees its own heads, so the gradient is partial
    over the group (``grad_partial_over_tp``). Elsewhere it is so only under sequence parallelism (megatron's
    ``sequence_parallel``).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, *, per_head: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel and not per_head  # type: ignore[attr-defined]
        self.weight.grad_partial_over_tp = per_head and config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)
