"""Time of a step, estimated from ceilings.

Every part of a layer is counted: products by their shape, element-wise work by the bytes it reads and writes, core attention,
collectives by :mod:`megamem_launch.plan.traffic`, and the interpreter's time for a layer as it was measured on one with nothing to
compute. Nothing is fitted to a layout. How the parts of a step combine is what the engine does:

- A pipeline takes ``sum over stages (f + b) / vpp + (m - 1 / vpp) max over stages (f + b)`` for ``m`` micro-batches, but no less
  than all of its work takes on the cores that the ranks of a node share. Collectives were measured on those cores already.
- Tensor-, context- and expert-parallel collectives stand in the way of a layer; nothing computes meanwhile.
- Dense gradients are reduced after the last backward pass and parameters gathered after the step: neither is overlapped.
- Rows are fetched while the step before computes where ``memory.prefetch_depth`` allows it: on a GPU that is hidden behind
  compute, on a CPU it takes part of the same cores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamem.memory.optimizers import build_row_optimizer
from megamem.memory.spec import TOUCHED, TableSpec
from megamem.memory.tiers.base import record_bytes
from megamem.observe.accounting import Work, reads_of
from megamem.observe.flops import core_flops
from megamem.parallel.layout import Layout
from megamem_kernels.formats import row_fields
from megamem_launch.config import RunConfig
from megamem_launch.plan.memory import BUCKET_ELEMENTS
from megamem_launch.plan.parameters import Parameter
from megamem_launch.plan.rates import Machine

_FP32 = 4

# Elements read and written per element of a part, forward and backward, counted in the code of megatron-core's CPU path and ours.
_NORM = (7, 14)
_RESIDUAL = (3, 3)
_ROPE = (13, 13)
_SPLIT_QKV = (2, 4)
_SWIGLU = (5, 15)
_PERMUTE = (8, 12)
_CROSS_ENTROPY = (12, 6)
_ENGRAM = (12, 24)
_FORWARD_SHARE = 1 / 3
"""Of the time of core attention and of the interpreter: backward takes twice as long."""
_WIRE_OPERATION = {"tp": "all_gather", "cp": "all_gather", "ep": "all_to_all", "pp": "send"}


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step, by what takes them, and what follows."""

    parts: dict[str, float]
    """``compute``, ``bubble``, ``tp``, ``cp``, ``ep``, ``pp``, ``dense_reduce``, ``dense_step``, ``dense_gather``, ``rows``."""
    tokens: int
    """Of the global batch."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds


def plan_time(
    config: RunConfig,
    layout: Layout,
    work: Work,
    machine: Machine,
    *,
    tables: Sequence[Sequence[TableSpec]],
    traffic: Sequence[Mapping[str, float]],
    parameters: Sequence[Sequence[Parameter]],
) -> StepTime:
    """Estimate a step.

    Args:
        config: Of the run.
        layout: Of the run.
        work: Of one rank.
        machine: Where.
        tables: Of every stage.
        traffic: Of every stage, from :func:`megamem_launch.plan.traffic.plan_traffic`.
        parameters: Of every stage.
    """
    m = work.micro_batches
    stages = [_stage_seconds(config, layout, work, machine, stage) for stage in range(layout.pp)]
    wires = [_wire_seconds(config, layout, work, machine, sent) for sent in traffic]
    passes = [
        forward + backward + sum(wire.values()) / m for (forward, backward), wire in zip(stages, wires, strict=True)
    ]
    longest = max(passes)
    span = sum(passes) / layout.vpp + (m - 1 / layout.vpp) * longest if layout.pp > 1 else m * longest
    busiest = max(range(layout.pp), key=lambda stage: passes[stage])
    compute = m * sum(stages[busiest])
    waits = {name: seconds for name, seconds in wires[busiest].items() if seconds}
    # All ranks of a node at once want more than its cores give.
    own = m * sum(sum(stage) for stage in stages) / layout.pp
    crowded = m * sum(passes) / layout.pp + (machine.crowding - 1) * own
    total = max(span, crowded)
    if crowded > span:
        compute = total - sum(waits.values())
    dense = [
        _dense_seconds(config, layout, work, machine, held, sent)
        for held, sent in zip(parameters, traffic, strict=True)
    ]
    slowest = max(dense, key=lambda parts: sum(parts.values()))
    rows = max(
        _row_seconds(config, layout, work, machine, specs, sent) for specs, sent in zip(tables, traffic, strict=True)
    )
    if machine.hardware.on_gpu and config.memory.prefetch_depth:
        rows = max(0.0, rows - total)
    parts = {"compute": compute, "bubble": total - compute - sum(waits.values()), **waits, **slowest, "rows": rows}
    tokens = config.train.global_batch_size * config.data.seq_length
    return StepTime({name: seconds for name, seconds in parts.items() if seconds > 0}, tokens)


def _stage_seconds(config: RunConfig, layout: Layout, work: Work, machine: Machine, stage: int) -> tuple[float, float]:
    """Forward and backward of one micro-batch through all chunks of a stage, without collectives."""
    model = config.model
    forward = backward = 0.0
    # Layers differ by what they have beside attention; those that have the same take equally long.
    alike = Counter(_parts_of(config, layer) for layer in layout.stage_layers(model.num_layers, stage))
    for parts, count in alike.items():
        there, back, again = _layer_seconds(config, layout, work, machine, parts)
        forward += count * there
        backward += count * (back + {"none": 0.0, "selective": again, "full": there}[work.recompute])
    tokens, h, w = work.micro_batch_size * work.seq_length / layout.cp, model.hidden_size, work.element_bytes
    vocabulary = model.padded_vocab_size / layout.tp
    if stage == 0:
        forward += machine.elementwise(tokens * h, w, 3)
        backward += _weight_gradient(machine, vocabulary * h, work)
    if stage == layout.pp - 1:
        there, back = _linear(machine, tokens, h, vocabulary, work)
        forward += there + machine.elementwise(tokens * vocabulary, _FP32, _CROSS_ENTROPY[0])
        backward += back + machine.elementwise(tokens * vocabulary, _FP32, _CROSS_ENTROPY[1])
    return forward, backward


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer has beside attention and a feed-forward part."""

    experts: bool
    engram: bool
    bank: bool


def _parts_of(config: RunConfig, layer: int) -> _Parts:
    bank = config.memory.bank
    return _Parts(
        experts=layer in config.model.moe.layers,
        engram=layer in config.memory.engram.layers,
        bank=bank.enabled and (not bank.layers or layer in bank.layers),
    )


def _layer_seconds(
    config: RunConfig, layout: Layout, work: Work, machine: Machine, parts: _Parts
) -> tuple[float, float, float]:
    """Forward, backward, and what selective recompute does again, of one micro-batch."""
    model, memory, tp, w = config.model, config.memory, layout.tp, work.element_bytes
    tokens, h = work.micro_batch_size * work.seq_length / layout.cp, model.hidden_size
    stream = tokens / (tp if work.sequence_parallel else 1)
    q, k = model.num_attention_heads * model.head_dim / tp, model.num_query_groups * model.head_dim / tp
    overhead = machine.layer_overhead()
    forward, backward = overhead * _FORWARD_SHARE, overhead * (1 - _FORWARD_SHARE)

    def add(elements: float, times: tuple[int, int], nbytes: int = w, count: float = 1) -> None:
        nonlocal forward, backward
        forward += count * machine.elementwise(elements, nbytes, times[0])
        backward += count * machine.elementwise(elements, nbytes, times[1])

    def linear(rows: float, inner: float, columns: float, count: float = 1) -> None:
        nonlocal forward, backward
        there, back = _linear(machine, rows, inner, columns, work)
        forward, backward = forward + count * there, backward + count * back

    linear(tokens, h, q + 2 * k)
    linear(tokens, q, h)
    for _ in range(2):
        add(stream * h, _NORM, _FP32)
        add(stream * h, _RESIDUAL)
    add(tokens * (q + 2 * k), _SPLIT_QKV)
    add(tokens * (q + k), _ROPE)
    if model.qk_layernorm:
        add(tokens * (q + k), _NORM, _FP32)
    # A kernel with a mask computes what it hides as well; the last context-parallel part sees the keys of all.
    causal = work.attention == "flash"
    flops = 3 * tokens * core_flops(model, work.seq_length, causal) / tp
    core = machine.attention(flops)
    forward += core * _FORWARD_SHARE
    backward += core * (1 - _FORWARD_SHARE)
    again = core * _FORWARD_SHARE
    if parts.experts:
        moe = model.moe
        routed = stream * moe.router_topk
        local = moe.num_experts / layout.ep
        rows = routed * layout.ep * layout.etp / local
        linear(rows, h, 2 * moe.ffn_hidden_size / layout.etp, local)
        linear(rows, moe.ffn_hidden_size / layout.etp, h, local)
        add(rows * moe.ffn_hidden_size / layout.etp, _SWIGLU, count=local)
        linear(stream, h, moe.num_experts)
        add(routed * h, _PERMUTE)
        each = machine.expert_overhead() * local
        forward += each * _FORWARD_SHARE
        backward += each * (1 - _FORWARD_SHARE)
        units = moe.shared_expert_hidden_size / tp
    else:
        units = model.ffn_hidden_size / tp
    if units:
        linear(tokens, h, 2 * units)
        linear(tokens, units, h)
        add(tokens * units, _SWIGLU)
    before = forward
    own = tokens / tp
    if parts.engram:
        columns = len(memory.engram.orders) * memory.engram.heads * memory.engram.width
        linear(own, columns, h)
        linear(own, columns, h)
        add(own * h, _ENGRAM)
        forward += machine.gather(2 * own * columns * _FP32) + overhead * _FORWARD_SHARE
        backward += machine.gather(4 * own * columns * _FP32) + overhead * (1 - _FORWARD_SHARE)
    if parts.bank:
        blocks = sum(memory.bank.units)
        linear(own, h, 2 * blocks)
        linear(own, blocks, h)
        add(own * blocks, _SWIGLU)
        forward += overhead * _FORWARD_SHARE
        backward += overhead * (1 - _FORWARD_SHARE)
    return forward, backward, again + forward - before


def _linear(machine: Machine, rows: float, inner: float, columns: float, work: Work) -> tuple[float, float]:
    """Forward and backward of a product with a weight, whose gradient is added to what other micro-batches left."""
    if not rows:
        return 0.0, 0.0
    product = machine.matmul(rows, inner, columns)
    return product, 2 * product + _weight_gradient(machine, inner * columns, work)


def _weight_gradient(machine: Machine, elements: float, work: Work) -> float:
    """Seconds to write it, and to add it to a sum in fp32."""
    added = 1 - 1 / work.micro_batches if work.element_bytes == _FP32 else 1.0
    return machine.copy(elements * (work.element_bytes + added * (work.element_bytes + 2 * _FP32)))


def _wire_seconds(
    config: RunConfig, layout: Layout, work: Work, machine: Machine, sent: Mapping[str, float]
) -> dict[str, float]:
    """Of all micro-batches of a step, what stands in the way of layers and stages."""
    layers, m = config.model.num_layers / layout.pp, work.micro_batches
    sizes = {
        "tp": (layout.tp, layout.tp, 10 * layers * m),
        "cp": (layout.cp, layout.slices, 2 * layers * m),
        "ep": (layout.ep * layout.etp, layout.ep * layout.etp, 8 * len(config.model.moe.layers) / layout.pp * m),
        "pp": (layout.pp, layout.world_size, 4 * layout.vpp * m),
    }
    return {
        wire: machine.collective(_WIRE_OPERATION[wire], sent.get(wire, 0.0), size, calls=calls, span=span)
        for wire, (size, span, calls) in sizes.items()
    }


def _dense_seconds(
    config: RunConfig,
    layout: Layout,
    work: Work,
    machine: Machine,
    parameters: Sequence[Parameter],
    sent: Mapping[str, float],
) -> dict[str, float]:
    """Reduction, step and gathering of the dense parameters. On a CPU crowded ranks take turns."""
    elements = sum(p.elements for p in parameters)
    replicas = layout.dp * layout.cp if config.optimizer.zero_stage else 1
    partition = elements / replicas
    times = work.micro_batches if config.optimizer.zero_stage == 2 else 1
    # Into a bucket, out of it, and divided there; then two norms read the partition.
    reduce = times * machine.copy(elements * 4 * _FP32 + partition * 2 * _FP32) + machine.copy(partition * _FP32)
    # Flat, clipped, AdamW (four numbers read, three written), rounded.
    step = machine.copy(partition * (2 + 2 + 7 + 2) * _FP32) + machine.touch(partition * _FP32)
    group = layout.dp * layout.cp
    # Bucket and averaged gradients are allocated in every step, and what several replicas reduce is copied once more.
    reduce += machine.touch((min(BUCKET_ELEMENTS, elements) + partition) * _FP32)
    reduce += times * machine.touch(elements * _FP32) if group > 1 else 0.0
    span = layout.stage_size
    return {
        "dense_reduce": machine.crowding * reduce
        + machine.collective("all_reduce", sent.get("dense_reduce", 0.0), max(2, group), span=span),
        "dense_step": machine.crowding * step,
        "dense_gather": machine.collective("all_gather", sent.get("dense_gather", 0.0), group, span=span),
    }


def _row_seconds(
    config: RunConfig,
    layout: Layout,
    work: Work,
    machine: Machine,
    specs: Sequence[TableSpec],
    sent: Mapping[str, float],
) -> float:
    """Gathering rows at their owners, moving them and their gradients, and the row optimizer."""
    memory, state = config.memory, build_row_optimizer(config.memory.optimizer)
    seconds = 0.0
    for spec in specs:
        rows = min(reads_of(spec.name, work, memory, layout), spec.rows)
        record = record_bytes(row_fields(memory.storage_of(spec.name).format, spec.width))
        states = record_bytes((*state.state_fields(spec.width), TOUCHED))
        seconds += machine.gather(rows * (record + _FP32 * spec.width))
        seconds += machine.row_update(rows * (2 * (record + states) + _FP32 * spec.width))
    return machine.crowding * seconds + machine.collective(
        "all_to_all", sent.get("row_exchange", 0.0), layout.stage_size, calls=3
    )
