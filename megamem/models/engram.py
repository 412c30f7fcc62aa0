"""Engram: gated reading of hashed n-gram rows into the residual stream (arXiv 2601.07372, section 2.3; one branch)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megamem.memory.config import EngramConfig
from megamem.memory.streams import engram_stream_name, engram_table_name
from megamem.models.micro import MicroContext
from megamem.models.norm import RMSNorm
from megamem.models.sequence import SequenceSlice

_MIN_SCORE = 1e-6  # the square root's slope is infinite at zero; below this it is taken as flat


class CausalConv(nn.Module):
    """Depth-wise causal convolution that starts at zero; a tap that would reach into another document reads zero."""

    def __init__(self, channels: int, taps: int, dilation: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dilation = dilation
        self.reach = (taps - 1) * dilation
        """Positions before an output that it can see."""
        self.weight = nn.Parameter(torch.zeros(channels, taps, dtype=dtype))
        """``[channels, taps]``; ``weight[:, j]`` multiplies the input ``dilation * (taps - 1 - j)`` positions back, as
        in :class:`torch.nn.Conv1d`."""
        self.weight.init_std = 0.0  # type: ignore[attr-defined]

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        """``x`` ``[reach + s, b, channels]`` and its documents ``[b, reach + s]`` to ``[s, b, channels]``."""
        length = x.shape[0] - self.reach
        documents = documents.t()
        *earlier, last = self.weight.unbind(1)
        output = x[self.reach :] * last
        for tap, weight in enumerate(earlier):
            window = slice(tap * self.dilation, tap * self.dilation + length)
            same = (documents[window] == documents[self.reach :]).unsqueeze(-1)
            output = torch.addcmul(output, x[window] * same, weight)
        return output


class Engram(MegatronModule):
    """Rows of the n-grams that end at each token, gated by how well their key fits the hidden state.

    With ``e`` the concatenated rows of a token, ``k = W_K e``, ``v = W_V e`` and all norms zero-centred RMSNorms::

        score = <norm_query(h), norm_key(k)> / sqrt(hidden_size)         in fp32
        score = sign(score) * sqrt(max(|score|, 1e-6))                   with sqrt_gate
        u = sigmoid(score) * v
        delta = silu(conv(norm_conv(u))) + u                             without conv: u

    Under tensor parallelism each rank works on its slice of the sequence with replicated parameters, whose gradients
    are partial over the group.
    """

    def __init__(
        self, config: TransformerConfig, *, engram: EngramConfig, layer: int, tp_group: ProcessGroup | None = None
    ) -> None:
        """``layer`` is zero-based over the whole model; ``tp_group`` defaults to megatron's."""
        super().__init__(config)
        hidden, eps, dtype = config.hidden_size, config.layernorm_epsilon, config.params_dtype
        embedding = len(engram.orders) * engram.heads * engram.width
        self.key_proj = nn.Linear(embedding, hidden, bias=False, dtype=dtype)
        self.value_proj = nn.Linear(embedding, hidden, bias=False, dtype=dtype)
        self.norm_key = RMSNorm(config, hidden, eps)
        self.norm_query = RMSNorm(config, hidden, eps)
        self.norm_conv: RMSNorm | None = None
        self.conv: CausalConv | None = None
        if engram.conv_kernel_size:
            self.norm_conv = RMSNorm(config, hidden, eps)
            self.conv = CausalConv(hidden, engram.conv_kernel_size, max(engram.orders), dtype)
        self.layer = layer
        self.gate_observer: Callable[[Tensor], None] | None = None
        """Called with the gates ``[s / tp, b, 1]`` fp32 of each forward pass, without gradient."""
        self._sqrt_gate = engram.sqrt_gate
        self._scale = 1 / math.sqrt(hidden)
        self._stream = engram_stream_name(layer)
        self._table = engram_table_name(layer)
        self._slice = SequenceSlice(config, tp_group)
        self._slice.mark_partial(self)

    def forward(self, hidden_states: Tensor, context: MicroContext) -> Tensor:
        """What to add to ``hidden_states``, in their shape and dtype.

        They are ``[s, b, h]``, or ``[s / tp, b, h]`` under sequence parallelism; ``context.memory`` must be there.
        """
        hidden_states = self._slice.enter(hidden_states)
        gated = self._gated_value(hidden_states, self._read(context).to(hidden_states.dtype))
        return self._slice.leave(self._refine(gated, context.document_ids))

    def _read(self, context: MicroContext) -> Tensor:
        """Concatenated rows ``[s / tp, b, E]``, in the rows' fp32 so that their gradients are summed in it."""
        assert context.memory is not None
        index = context.memory.index(self._stream).transpose(0, 1)
        return F.embedding(index, context.memory.rows(self._table)).flatten(-2)

    def _gated_value(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        query = self.norm_query(hidden_states.float())
        key = self.norm_key(self.key_proj(embedding).float())
        score = (query * key).sum(-1, keepdim=True) * self._scale
        if self._sqrt_gate:
            score = score.sign() * score.abs().clamp_min(_MIN_SCORE).sqrt()
        gate = score.sigmoid()
        if self.gate_observer is not None:
            self.gate_observer(gate.detach())
        return (gate * self.value_proj(embedding)).to(hidden_states.dtype)

    def _refine(self, gated: Tensor, document_ids: Tensor) -> Tensor:
        if self.conv is None or self.norm_conv is None:
            return gated
        extended = self._slice.extend_left(self.norm_conv(gated), self.conv.reach)
        return F.silu(self.conv(extended, self._slice.documents(document_ids, self.conv.reach))) + gated
