"""A transformer layer that reads memories."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megamem.models.micro import MicroContext


@dataclass
class MemoryTransformerLayerSubmodules(TransformerLayerSubmodules):
    """Submodules of a :class:`MemoryTransformerLayer`; a layer without a memory leaves its place None."""

    engram: ModuleSpec | None = None
    bank: ModuleSpec | None = None


class MemoryTransformerLayer(TransformerLayer):
    """megatron-core's layer with an Engram before attention and a bank beside the feed-forward part::

        h = h + engram(h)
        x = h + attention(norm(h))
        y = x + mlp(norm(x)) + bank(norm(x))

    Both memories are skipped where the context carries none. Under selective recompute backward computes them again, as it
    does the core attention.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MemoryTransformerLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.engram = (
            None
            if submodules.engram is None
            else build_module(submodules.engram, config, pg_collection=self.pg_collection)
        )
        self.bank = (
            None if submodules.bank is None else build_module(submodules.bank, config, pg_collection=self.pg_collection)
        )

    def forward(
        self, hidden_states: Tensor, *, packed_seq_params: MicroContext | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (``s`` a slice under sequence or context parallelism) to the same shape, and megatron's unused context."""
        micro = packed_seq_params if packed_seq_params is not None and packed_seq_params.memory is not None else None
        if micro is not None and self.engram is not None:
            hidden_states = hidden_states + self._read(self.engram, hidden_states, micro)
        if micro is None or self.bank is None:
            return super().forward(hidden_states, packed_seq_params=packed_seq_params, **kwargs)
        hidden_states, context = self._forward_attention(hidden_states, packed_seq_params=micro, **kwargs)
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        # Before the feed-forward part, so that backward adds its gradient to one that lies in order in memory: the bank's own
        # does not unless it was recomputed, and the layout of their sum decides in which order the norm's gradient is summed.
        added = self._read(self.bank, normed, micro)
        output, bias = self.mlp(normed)
        return self._forward_post_mlp((output + added, bias), hidden_states), context

    def _read(self, memory: nn.Module, x: Tensor, micro: MicroContext) -> Tensor:
        if self.config.recompute_granularity == "selective" and self.training:
            return tensor_parallel.checkpoint(partial(memory, context=micro), False, x)
        return memory(x, micro)
