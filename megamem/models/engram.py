"""Engram: gated reading of hashed n-gram rows into the residual stream (arXiv 2601.07372, section 2.3; one branch)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megamem.memory.config import EngramConfig
from megamem.memory.names import engram_stream_name, engram_table_name
from megamem.models.micro import MicroContext
from megamem.models.norm import RMSNorm
from megamem.models.sequence import SequenceSlice
from megamem_kernels.engram_conv import engram_conv
from megamem_kernels.engram_gate import engram_gate


class CausalConv(nn.Module):
    """Taps of a depth-wise causal convolution that starts at zero; :func:`megamem_kernels.engram_conv.engram_conv` runs
    it."""

    def __init__(self, channels: int, taps: int, dilation: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dilation = dilation
        self.reach = (taps - 1) * dilation
        """Positions before an output that it can see."""
        self.weight = nn.Parameter(torch.zeros(channels, taps, dtype=dtype))
        """``[channels, taps]``; ``weight[:, j]`` multiplies the input ``dilation * (taps - 1 - j)`` positions back, as
        in :class:`torch.nn.Conv1d`."""
        self.weight.init_std = 0.0  # type: ignore[attr-defined]


class Engram(MegatronModule):
    """Rows of the n-grams that end at each token, gated by how well their key fits the hidden state.

    With ``e`` the concatenated rows of a token, ``k = W_K e``, ``v = W_V e`` and all norms zero-centred RMSNorms::

        score = <norm_query(h), norm_key(k)> / sqrt(hidden_size)         in fp32
        score = sign(score) * sqrt(max(|score|, 1e-6))                   with sqrt_gate
        u = sigmoid(score) * v
        delta = silu(conv(norm_conv(u))) + u                             without conv: u

    Under tensor and context parallelism each rank works on its slice of the sequence with replicated parameters, whose
    gradients are partial over the group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        engram: EngramConfig,
        layer: int,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """``layer`` is zero-based over the whole model; ``pg_collection`` defaults to megatron's groups."""
        super().__init__(config)
        hidden, eps, dtype = config.hidden_size, config.layernorm_epsilon, config.params_dtype
        embedding = len(engram.orders) * engram.heads * engram.width
        self.key_proj = nn.Linear(embedding, hidden, bias=False, dtype=dtype)
        self.value_proj = nn.Linear(embedding, hidden, bias=False, dtype=dtype)
        self.norm_key = RMSNorm(config, hidden, eps, zero_centered=True)
        self.norm_query = RMSNorm(config, hidden, eps, zero_centered=True)
        self.norm_conv: RMSNorm | None = None
        self.conv: CausalConv | None = None
        if engram.conv_kernel_size:
            self.norm_conv = RMSNorm(config, hidden, eps, zero_centered=True)
            self.conv = CausalConv(hidden, engram.conv_kernel_size, max(engram.orders), dtype)
        self.layer = layer
        self.gate_observer: Callable[[Tensor], None] | None = None
        """Called with the gates ``[s / slices, b, 1]`` fp32 of each forward pass, without gradient."""
        self._sqrt_gate = engram.sqrt_gate
        self._scale = 1 / math.sqrt(hidden)
        self._stream = engram_stream_name(layer)
        self._table = engram_table_name(layer)
        self._slice = SequenceSlice(config, pg_collection)
        self._slice.mark_partial(self)

    def forward(self, hidden_states: Tensor, context: MicroContext) -> Tensor:
        """What to add to ``hidden_states``, in their shape and dtype.

        They are ``[s / cp, b, h]``, or ``[s / (cp * tp), b, h]`` under sequence parallelism; ``context.memory`` must be there.
        """
        hidden_states = self._slice.enter(hidden_states)
        gated = self._gated_value(hidden_states, self._read(context).to(hidden_states.dtype))
        return self._slice.leave(self._refine(gated, context.document_ids))

    def _read(self, context: MicroContext) -> Tensor:
        """Concatenated rows ``[s / slices, b, E]``, in the rows' fp32 so that their gradients are summed in it."""
        assert context.memory is not None
        return context.memory.lookup(self._table, self._stream).flatten(-2)

    def _gated_value(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        gated, gate = engram_gate(
            hidden_states,
            self.key_proj(embedding),
            self.value_proj(embedding),
            self.norm_query.weight,
            self.norm_key.weight,
            epsilon=self.norm_query.eps,
            sqrt_gate=self._sqrt_gate,
            scale=self._scale,
        )
        if self.gate_observer is not None:
            self.gate_observer(gate)
        return gated

    def _refine(self, gated: Tensor, document_ids: Tensor) -> Tensor:
        if self.conv is None or self.norm_conv is None:
            return gated
        # Left neighbours' positions come before their norm: the kernel norms them again, which is less work than to split
        # it there, and each rank's share of the norm's gradient is that of its own outputs.
        context = self.conv.reach if self._slice.size > 1 else 0
        return engram_conv(
            self._slice.extend_left(gated, context),
            self._slice.documents(document_ids, context),
            self.norm_conv.weight,
            self.conv.weight,
            context=context,
            dilation=self.conv.dilation,
            epsilon=self.norm_conv.eps,
        )
