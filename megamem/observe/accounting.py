"""Memory of one rank by part and place, told before the first step: what is allocated, and estimates of what will be.

Keys are ``PART_PLACE``. Parts: ``parameters``, ``gradients`` (as they accumulate), ``optimizer`` (fp32 master weights and
moments), ``tables`` (rows and their state), ``activations`` (an estimate), ``buffers`` (gradient reduction, and estimates of the
working sets of rows and of what saving takes per row). Places: ``device``, ``host``, ``disk``; without an accelerator everything
that would be on one is in host memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megamem.memory.config import MemoryConfig
from megamem.memory.names import engram_table_name
from megamem.models.config import ModelConfig
from megamem.parallel.layout import Layout
from megamem.train.config import Recompute

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("parameters", "gradients", "optimizer", "tables", "activations", "buffers")
ESTIMATES = {"activations": "estimate", "buffers": "partly estimate"}
"""Parts that are not read off what is allocated, and how the printed table says so."""
PLACES = ("device", "host", "disk")
_FP32 = 4
_DOCUMENTS_PER_SEQUENCE = 2


class SizedTable(Protocol):
    """What accounting asks of a :class:`~megamem.memory.table.OwnedTable`."""

    @property
    def spec(self) -> TableShape: ...

    def resident_bytes(self) -> dict[str, int]:
        """Bytes of rows and state by place."""
        ...


class TableShape(Protocol):
    """What accounting asks of a :class:`~megamem.memory.spec.TableSpec`."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank computes per step."""

    seq_length: int
    micro_batch_size: int
    micro_batches: int
    """Micro-batches per step on one data-parallel rank."""
    element_bytes: int
    """Bytes of an activation: 4 for fp32, 2 for bf16."""
    sequence_parallel: bool
    recompute: Recompute
    device: str
    """``cuda`` or ``cpu``."""
    attention: str
    """``sdpa`` or ``flash``, from :func:`megamem.models.attention.choose_backend`."""


def account(
    work: Work,
    *,
    model: ModelConfig,
    memory: MemoryConfig,
    layout: Layout,
    stage: int,
    dense: Mapping[str, int],
    tables: Iterable[SizedTable],
) -> dict[str, int]:
    """Bytes of a rank of pipeline stage ``stage`` by part and place; parts that take none are left out.

    Args:
        work: What it computes.
        model: The backbone.
        memory: Memories and how they are fetched.
        layout: Of the run.
        stage: Pipeline stage.
        dense: Of dense parameters, from :meth:`megamem.parallel.zero.ZeroEngine.memory`.
        tables: What this rank owns.
    """
    near = "device" if work.device == "cuda" else "host"
    held = Counter(dense)
    for table in tables:
        for place, size in table.resident_bytes().items():
            held[f"tables_{place}"] += size
        held[f"buffers_{near}"] += working_set_bytes(table.spec, work, memory, layout)
    held[f"activations_{near}"] += activation_bytes(work, model, memory, layout, stage)
    return {key: size for key, size in sorted(held.items()) if size}


def working_set_bytes(table: TableShape, work: Work, memory: MemoryConfig, layout: Layout) -> int:
    """Estimate of the fp32 rows that one rank holds of a table: those of the steps that are under way, and a gradient for each
    row of one of them (of every one with stale rows).

    An upper bound for Engram, as if no n-gram came twice; a bank block is read by documents, taken as two per sequence.
    """
    slots = memory.prefetch_depth + 1
    copies = slots + (1 if memory.staleness == 0 else slots)
    return copies * min(reads_of(table.name, work, memory, layout), table.rows) * table.width * _FP32


def reads_of(table: str, work: Work, memory: MemoryConfig, layout: Layout) -> int:
    """Rows of a table that one rank reads in a step, as if none came twice; of a bank one for each document."""
    sequences = work.micro_batch_size * work.micro_batches
    if table in {engram_table_name(layer) for layer in memory.engram.layers}:
        tokens = sequences * work.seq_length // layout.slices
        return tokens * len(memory.engram.orders) * memory.engram.heads
    return sequences * _DOCUMENTS_PER_SEQUENCE


def activation_bytes(work: Work, model: ModelConfig, memory: MemoryConfig, layout: Layout, stage: int) -> int:
    """Estimate of the tensors that one rank keeps for backward, at the busiest moment of a step.

    After Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for this backbone. Per token, in elements of ``w`` bytes except
    where norms keep their input in fp32, with ``q = heads * d``, ``k = groups * d``, ``h`` and ``f`` the hidden and
    feed-forward widths, a dense layer keeps::

        residual stream   2h (fp32: inputs of the norms) + 2h (inputs of QKV and of the feed-forward part)
        attention         q + k (fp32: inputs of the head norms) + q + k + k (after RoPE, values) + 2q (output, also as rows)
        feed-forward      3f (input of SwiGLU and its output)

    where the second and third are divided by the tensor-parallel size and the first only under sequence parallelism. A layer of
    experts keeps ``2h + 3f`` for each of a token's routed experts, taken as evenly spread. An Engram of ``e`` concatenated
    columns keeps ``2e`` (one in fp32) and ``6h``, a bank of ``u`` units ``5u + h``, both for the rank's slice of the sequence,
    and ``3uh`` for each document of a micro-batch, taken as two per sequence. The last stage adds ``2h`` and ``v`` logits, plain
    and as fp32 probabilities. Of the size of the sequence squared flash-attn keeps nothing; SDPA keeps the mask of packed
    documents, once per micro-batch, and on CUDA wants as many key heads as query heads beside it. Context parallelism adds the
    keys and values of the whole sequence.

    ``recompute`` ``selective`` leaves out what the core attention keeps beyond its input and memories beyond theirs; ``full``
    keeps the ``h`` of every layer, and all of the one layer that backward is in. A stage of a 1F1B pipeline keeps ``pp - stage``
    micro-batches at most, an interleaved one ``2 (pp - stage - 1) + (vpp - 1) pp + 1`` chunks of its layers, of ``2 pp``
    micro-batches at most.
    """
    tokens = work.micro_batch_size * work.seq_length // layout.cp
    layers = layout.stage_layers(model.num_layers, stage)
    per_layer = [_layer_bytes(work, model, memory, layout, layer) for layer in layers]
    if work.recompute == "full":
        stream = len(layers) * model.hidden_size * work.element_bytes / _stream_shards(work, layout)
        kept, rebuilt = stream, max(per_layer)
    else:
        kept, rebuilt = sum(per_layer), 0.0
    if layout.vpp > 1:
        chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
        micro_batches = min(work.micro_batches, 2 * layout.pp)
    else:
        chunks = micro_batches = min(work.micro_batches, layout.pp - stage)
    total = kept * min(chunks, work.micro_batches * layout.vpp) / layout.vpp + rebuilt
    if work.attention == "sdpa":
        total += work.seq_length * work.element_bytes * micro_batches  # the last part sees the keys of all
    if stage == layout.pp - 1:
        w, shards = work.element_bytes, _stream_shards(work, layout)
        total += model.hidden_size * (_FP32 + w) / shards + model.padded_vocab_size * (_FP32 + w) / layout.tp
    return int(total * tokens)


def _stream_shards(work: Work, layout: Layout) -> int:
    """Ranks that share the residual stream of a part of the sequence."""
    return layout.tp if work.sequence_parallel else 1


def _layer_bytes(work: Work, model: ModelConfig, memory: MemoryConfig, layout: Layout, layer: int) -> float:
    """Bytes per token that one layer keeps without recompute, or with ``selective``."""
    w, h = work.element_bytes, model.hidden_size
    q, k = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    seen = (
        q if work.attention == "sdpa" and work.device == "cuda" else k
    )  # keys that one part of the sequence attends with
    selective = work.recompute == "selective"

    stream = 2 * h * (_FP32 + w)
    attention = (q + k) * (_FP32 if model.qk_layernorm else 0)
    attention += (2 * q + 2 * k if selective else 3 * q + 2 * seen * layout.cp) * w
    total = stream / _stream_shards(work, layout) + attention / layout.tp
    if layer in model.moe.layers:
        moe = model.moe
        routed = moe.router_topk * (2 * h + 3 * moe.ffn_hidden_size / layout.etp) * w * layout.etp / layout.tp
        total += routed + 3 * moe.shared_expert_hidden_size * w / layout.tp + 2 * moe.num_experts * _FP32
    else:
        total += 3 * model.ffn_hidden_size * w / layout.tp
    if layer in memory.engram.layers:
        engram = memory.engram
        columns = len(engram.orders) * engram.heads * engram.width
        total += (h * w if selective else columns * (_FP32 + w) + 6 * h * w) / layout.tp
    if memory.bank.enabled and (not memory.bank.layers or layer in memory.bank.layers):
        units = sum(memory.bank.units)
        total += (h if selective else 5 * units + h) * w / layout.tp
        if not selective:
            total += _DOCUMENTS_PER_SEQUENCE * layout.cp / work.seq_length * 3 * units * h * w
    return total


def largest(ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """For each part and place, the most that any rank holds."""
    return {key: max(rank.get(key, 0) for rank in ranks) for key in sorted(set().union(*ranks))}


def totals(held: Mapping[str, int]) -> dict[str, int]:
    """Sums over the parts, by place; places that hold nothing are left out."""
    sums = {place: sum(size for key, size in held.items() if key.endswith(f"_{place}")) for place in PLACES}
    return {place: size for place, size in sums.items() if size}


def render(own: Mapping[str, int], most: Mapping[str, int], *, most_total: Mapping[str, int]) -> Table:
    """A table for the terminal: this rank, and the most of any rank.

    Args:
        own: From :func:`account`.
        most: Of all ranks, from :func:`largest`.
        most_total: The largest total of any rank by place, which is less than the sum of ``most`` where ranks differ.
    """
    from rich.table import Table

    from megamem.observe.progress import format_bytes

    table = Table(title="memory per rank", title_justify="left", box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("where")
    table.add_column("rank 0", justify="right")
    table.add_column("most of any rank", justify="right")
    for part in PARTS:
        label = f"{part} ({ESTIMATES[part]})" if part in ESTIMATES else part
        for place in PLACES:
            if most.get(key := f"{part}_{place}"):
                table.add_row(label, place, format_bytes(own.get(key, 0)), format_bytes(most[key]))
    sums = totals(own)
    for place, size in most_total.items():
        table.add_row("total", place, format_bytes(sums.get(place, 0)), format_bytes(size), style="bold")
    return table
