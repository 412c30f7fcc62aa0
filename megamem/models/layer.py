"""A transformer layer that reads memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

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

    Both memories are skipped where the context carries none.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MemoryTransformerLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.engram = (
            None if submodules.engram is None else build_module(submodules.engram, config, tp_group=self.tp_group)
        )
        self.bank = None if submodules.bank is None else build_module(submodules.bank, config, tp_group=self.tp_group)

    def forward(
        self, hidden_states: Tensor, *, packed_seq_params: MicroContext | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (``s`` a slice under sequence parallelism) to the same shape, and megatron's unused context."""
        memory = packed_seq_params is not None and packed_seq_params.memory is not None
        if memory and self.engram is not None:
            hidden_states = hidden_states + self.engram(hidden_states, packed_seq_params)
        if not memory or self.bank is None:
            return super().forward(hidden_states, packed_seq_params=packed_seq_params, **kwargs)
        hidden_states, context = self._forward_attention(hidden_states, packed_seq_params=packed_seq_params, **kwargs)
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        output, bias = self.mlp(normed)
        output = output + self.bank(normed, packed_seq_params)
        return self._forward_post_mlp((output, bias), hidden_states), context
