"""The dense parameters of a pipeline stage by name and shape, told from the configuration alone.

Names and order are those of ``named_parameters()`` of the built model, since ZeRO cuts its partitions in that order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megamem.memory.config import EngramConfig, MemoryConfig
from megamem.models.config import ModelConfig
from megamem.parallel.layout import Layout


@dataclass(frozen=True)
class Parameter:
    """A tensor as one rank holds it."""

    name: str
    """Within its chunk of layers."""
    shape: tuple[int, ...]
    split: bool = False
    """Whether each rank of its tensor-parallel group holds another part."""
    copy: bool = False
    """Whether it is the last stage's copy of an embedding that the first stage holds."""
    spread: bool = False
    """Whether expert parallelism distributes it: its replicas are not those of other parameters."""

    @functools.cached_property
    def elements(self) -> int:
        """How many numbers it has here."""
        return math.prod(self.shape)

    @property
    def routed(self) -> bool:
        """Whether it belongs to a routed expert."""
        return ".mlp.experts." in self.name

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies."""
        return len(self.shape) > 1


def stage_parameters(model: ModelConfig, memory: MemoryConfig, layout: Layout, stage: int) -> list[Parameter]:
    """What every rank of ``stage`` holds, chunk after chunk."""
    return [
        parameter for chunk in range(layout.vpp) for parameter in _chunk_parameters(model, memory, layout, stage, chunk)
    ]


class StageShapes:
    """:func:`stage_parameters` of one model, worked out once for each layout and stage."""

    def __init__(self, model: ModelConfig, memory: MemoryConfig) -> None:
        self._model, self._memory = model, memory
        self._known: dict[tuple[Layout, int], list[Parameter]] = {}

    def of(self, layout: Layout, stage: int) -> list[Parameter]:
        """What every rank of ``stage`` holds."""
        key = layout, stage
        if key not in self._known:
            self._known[key] = stage_parameters(self._model, self._memory, layout, stage)
        return self._known[key]


def buffer_elements(model: ModelConfig, layout: Layout, stage: int) -> int:
    """fp32 numbers in the buffers of ``stage``: the selection bias and the load of its experts."""
    if model.moe.router != "sigmoid_bias":
        return 0
    return 2 * model.moe.num_experts * len(set(layout.stage_layers(model.num_layers, stage)) & set(model.moe.layers))


def count_parameters(model: ModelConfig, memory: MemoryConfig) -> dict[str, int]:
    """Parameters of the whole model by kind, each counted once: ``dense``, ``experts``."""
    counts = {"dense": 0, "experts": 0}
    for parameter in stage_parameters(model, memory, Layout(), 0):
        counts["experts" if parameter.routed else "dense"] += parameter.elements
    return counts


def _chunk_parameters(
    model: ModelConfig, memory: MemoryConfig, layout: Layout, stage: int, chunk: int
) -> Iterator[Parameter]:
    first = stage == chunk == 0
    last = stage == layout.pp - 1 and chunk == layout.vpp - 1
    vocabulary = (model.padded_vocab_size // layout.tp, model.hidden_size)
    if first:
        yield Parameter("embedding.word_embeddings.weight", vocabulary, split=True)
    for place, layer in enumerate(layout.chunk_layers(model.num_layers, stage, chunk)):
        yield from _layer_parameters(model, memory, layout, layer, f"decoder.layers.{place}.")
    if last:
        yield Parameter("decoder.final_layernorm.weight", (model.hidden_size,))
        tied = not model.untie_embeddings_and_output_weights
        if not (tied and first):
            yield Parameter("output_layer.weight", vocabulary, split=True, copy=tied)


def _layer_parameters(
    model: ModelConfig, memory: MemoryConfig, layout: Layout, layer: int, prefix: str
) -> Iterator[Parameter]:
    h, d, tp = model.hidden_size, model.head_dim, layout.tp
    queries, projected = model.num_attention_heads * d, (model.num_attention_heads + 2 * model.num_query_groups) * d
    yield Parameter(f"{prefix}input_layernorm.weight", (h,))
    yield Parameter(f"{prefix}self_attention.linear_proj.weight", (h, queries // tp), split=True)
    yield Parameter(f"{prefix}self_attention.linear_qkv.weight", (projected // tp, h), split=True)
    if model.qk_layernorm:
        yield Parameter(f"{prefix}self_attention.q_layernorm.weight", (d,))
        yield Parameter(f"{prefix}self_attention.k_layernorm.weight", (d,))
    yield Parameter(f"{prefix}pre_mlp_layernorm.weight", (h,))
    if layer in model.moe.layers:
        moe = model.moe
        yield Parameter(f"{prefix}mlp.router.weight", (moe.num_experts, h))
        spread = layout.ep > 1 or layout.etp != tp
        for expert in range(moe.num_experts // layout.ep):
            experts = f"{prefix}mlp.experts.local_experts.{expert}."
            yield from _swiglu(experts, h, moe.ffn_hidden_size // layout.etp, spread=spread)
        if moe.shared_expert_hidden_size:
            yield from _swiglu(f"{prefix}mlp.shared_experts.", h, moe.shared_expert_hidden_size // tp)
    else:
        yield from _swiglu(f"{prefix}mlp.", h, model.ffn_hidden_size // tp)
    if layer in memory.engram.layers:
        yield from _engram(memory.engram, h, f"{prefix}engram.")


def _swiglu(prefix: str, hidden: int, units: int, *, spread: bool = False) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}linear_fc1.weight", (2 * units, hidden), split=True, spread=spread)
    yield Parameter(f"{prefix}linear_fc2.weight", (hidden, units), split=True, spread=spread)


def _engram(engram: EngramConfig, hidden: int, prefix: str) -> Iterator[Parameter]:
    columns = len(engram.orders) * engram.heads * engram.width
    yield Parameter(f"{prefix}key_proj.weight", (hidden, columns))
    yield Parameter(f"{prefix}value_proj.weight", (hidden, columns))
    yield Parameter(f"{prefix}norm_key.weight", (hidden,))
    yield Parameter(f"{prefix}norm_query.weight", (hidden,))
    if engram.conv_kernel_size:
        yield Parameter(f"{prefix}norm_conv.weight", (hidden,))
        yield Parameter(f"{prefix}conv.weight", (hidden, engram.conv_kernel_size))
