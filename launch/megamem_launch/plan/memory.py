"""Memory of every rank of a layout, told without building a model: what is held, and the most at any moment of a step.

What is held follows :mod:`megamem.observe.accounting` and :mod:`megamem.parallel.zero_memory` to the byte; those read it off a
rank that was built. Not all of it exists at the same time, so the peak is the largest of these moments::

    forward, backward   gradients + activations + gradients of the logits and of the largest parameter [+ bucket of stage 2]
    reduce              gradients, a bucket and, among replicas, its copy, and averaged gradients of the partition
    step                averaged gradients of the partition, and once more those of the largest group, flat
    gather              parameters of the largest group, which gloo gathers beside those that there are

beside parameters, optimizer state, tables and working sets, which stay. On a CPU the C library returns blocks of 32 MiB and more
to the system at once, and keeps smaller ones, scattered, for later: there the peak is that of the small ones, times
``1 + hardware.ceilings.fragmentation``, plus that of the large ones. Partitions and buckets below 32 MiB find no hole among the
small ones, so the heap grows by them.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megamem.memory.optimizers import build_row_optimizer
from megamem.memory.spec import TOUCHED, TableSpec, disk_bytes
from megamem.memory.streams import build_streams
from megamem.memory.tiers.base import record_bytes
from megamem.memory.tiers.disk import planned_bytes
from megamem.observe.accounting import Work, account, working_set_bytes
from megamem.parallel.layout import Coordinates, Layout, owner_range
from megamem_checkpoints.owned import index_bytes
from megamem_kernels.formats import row_fields
from megamem_launch.config import RunConfig
from megamem_launch.plan.hardware import HardwareConfig
from megamem_launch.plan.parameters import Parameter, StageShapes, buffer_elements

_FP32 = 4
BUCKET_ELEMENTS = 1 << 24
"""As :data:`megamem.parallel.gradients.BUCKET_ELEMENTS`, which cannot be imported without megatron-core."""
_ALIGNMENT = 2
"""Elements per rank that DeepSpeed pads the flat parameters of a group to a multiple of."""
_LASTING = ("parameters", "optimizer", "tables", "process", "saving")
_HEAP_LIMIT = 32 * 2**20
"""glibc's greatest ``M_MMAP_THRESHOLD``: larger blocks are the system's again as soon as they are freed."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Of one rank, in bytes."""

    rank: int
    held: dict[str, int]
    """By part and place, as :func:`megamem.observe.accounting.account` tells it; ``process_host``; and ``saving_host``, what a
    checkpoint takes to know which rows changed."""
    peak: dict[str, int]
    """By place: the most at any moment of a step."""
    moment: str
    """When the device, or without one the host, holds the most: ``forward and backward``, ``reduce``, ``step`` or ``gather``."""


@dataclass(frozen=True, slots=True)
class _Table:
    """What accounting asks of a table."""

    spec: TableSpec
    held: dict[str, int]
    rows: int

    def resident_bytes(self) -> dict[str, int]:
        return self.held


@dataclass(frozen=True)
class _Group:
    """Parameters that ZeRO keeps in one flat tensor, on one rank."""

    parameters: list[Parameter]
    shards: int
    shard: int

    @functools.cached_property
    def flat(self) -> int:
        """Elements with padding."""
        unit = _ALIGNMENT * self.shards
        return -(-sum(p.elements for p in self.parameters) // unit) * unit

    @property
    def partition(self) -> int:
        return self.flat // self.shards

    @property
    def overlapping(self) -> int:
        """Elements of the parameters that the partition has any part of."""
        low, high, at, total = self.shard * self.partition, (self.shard + 1) * self.partition, 0, 0
        for parameter in self.parameters:
            if at < high and at + parameter.elements > low:
                total += parameter.elements
            at += parameter.elements
        return total


def work_of(config: RunConfig, layout: Layout, hardware: HardwareConfig) -> Work:
    """What one rank computes per step. On GPUs flash-attn is taken to be installed unless the configuration says ``sdpa``."""
    precision = precision_on(config, hardware)
    backend = config.model.attention_backend
    if backend == "auto":
        backend = "flash" if hardware.on_gpu and precision == "bf16" else "sdpa"
    return Work(
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        micro_batches=config.train.global_batch_size // (config.train.micro_batch_size * layout.dp),
        element_bytes=2 if precision == "bf16" else _FP32,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.train.recompute,
        device="cuda" if hardware.on_gpu else "cpu",
        attention=backend,
    )


def precision_on(config: RunConfig, hardware: HardwareConfig) -> Literal["fp32", "bf16"]:
    """What ``train.precision`` means there."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if hardware.on_gpu else "fp32"


def model_tables(config: RunConfig) -> list[TableSpec]:
    """The tables of all stages. ``model.vocab_size`` must be set."""
    memory, model = config.memory, config.model
    streams = build_streams(
        model,
        memory,
        layers=range(model.num_layers),
        eos_id=0,
        # Which ids are alike changes addresses, and no size.
        fold=np.arange(model.vocab_size) if memory.engram.fold_tokens else None,
        seed=config.train.seed,
    )
    return [spec for stream in streams for spec in stream.tables]


def stage_tables(tables: Sequence[TableSpec], config: RunConfig, layout: Layout, stage: int) -> list[TableSpec]:
    """Those of ``tables`` that belong to the layers of a pipeline stage."""
    prefixes = tuple(f"decoder.layers.{layer}." for layer in layout.stage_layers(config.model.num_layers, stage))
    return [spec for spec in tables if spec.name.startswith(prefixes)]


def plan_memory(
    config: RunConfig,
    layout: Layout,
    hardware: HardwareConfig,
    *,
    tables: Sequence[TableSpec],
    ranks: Sequence[int] | None = None,
    shapes: StageShapes | None = None,
) -> list[RankMemory]:
    """Memory of ``ranks``; None for the first rank of every stage, which no other rank of the stage exceeds by more than the
    parameters that a partition cuts. ``tables``: of the model, from :func:`model_tables`; ``shapes``: likewise, where a caller has
    them."""
    if ranks is None:
        ranks = [layout.rank(pp=stage) for stage in range(layout.pp)]
    work, shapes = work_of(config, layout, hardware), shapes or StageShapes(config.model, config.memory)
    places = [layout.coordinates(rank) for rank in ranks]
    return [
        _plan_rank(
            config,
            layout,
            hardware,
            work,
            place,
            shapes.of(layout, place.pp),
            stage_tables(tables, config, layout, place.pp),
        )
        for place in places
    ]


def _plan_rank(
    config: RunConfig,
    layout: Layout,
    hardware: HardwareConfig,
    work: Work,
    place: Coordinates,
    parameters: Sequence[Parameter],
    specs: Sequence[TableSpec],
) -> RankMemory:
    near = "device" if hardware.on_gpu else "host"
    groups = _zero_groups(parameters, config, layout, place)
    owned = _owned_tables(config, layout, hardware, place, specs)
    held = account(
        work,
        model=config.model,
        memory=config.memory,
        layout=layout,
        stage=place.pp,
        dense=_zero_bytes(groups, config, layout, work, place, near),
        tables=owned,
    )
    saving = sum(index_bytes(table.rows, config.checkpoint.incremental) for table in owned)
    ceilings = hardware.ceilings
    process = ceilings.process_mib + (ceilings.kernels_mib if specs else 0)
    held = {**held, "process_host": int(process * 2**20), "saving_host": saving}
    held = {key: size for key, size in sorted(held.items()) if size}
    working_sets = sum(working_set_bytes(spec, work, config.memory, layout) for spec in specs)
    peak, moment = _peak(held, parameters, groups, config, layout, hardware, work, place, working_sets)
    return RankMemory(place.rank, held, peak, moment)


def _zero_groups(
    parameters: Sequence[Parameter], config: RunConfig, layout: Layout, place: Coordinates
) -> list[_Group]:
    """As :mod:`megamem.parallel.zero` orders them: dense and expert parameters, each with and without weight decay."""
    in_stage = place.rank % layout.stage_size
    dense = layout.dp * layout.cp, in_stage // layout.tp
    expert = layout.stage_size // (layout.ep * layout.etp), in_stage // (layout.ep * layout.etp)
    groups = []
    for spread, (shards, shard) in ((False, dense), (True, expert)):
        for decayed in (True, False):
            chosen = [p for p in parameters if p.spread == spread and p.decayed == decayed]
            if chosen:
                groups.append(_Group(chosen, *((shards, shard) if config.optimizer.zero_stage else (1, 0))))
    return groups


def _zero_bytes(
    groups: Sequence[_Group], config: RunConfig, layout: Layout, work: Work, place: Coordinates, near: str
) -> dict[str, int]:
    """What :func:`megamem.parallel.zero_memory.zero_memory` says of the built engine."""
    stage, offload = config.optimizer.zero_stage, config.optimizer.offload == "host"
    width, fp32 = work.element_bytes, work.element_bytes == _FP32
    partition = sum(group.partition for group in groups)
    overlapping = sum(group.overlapping for group in groups)
    elements = sum(p.elements for group in groups for p in group.parameters)
    bucket = min(BUCKET_ELEMENTS, elements)
    held: Counter[str] = Counter()
    held[f"parameters_{near}"] += width * sum(group.flat for group in groups)
    held[f"parameters_{near}"] += _FP32 * buffer_elements(config.model, layout, place.pp)
    steps = 0 if offload else _FP32 * len(groups)
    held["optimizer_host" if offload else f"optimizer_{near}"] += 3 * _FP32 * partition + steps
    if stage == 2:
        kept = _FP32 * (overlapping if fp32 else partition)
        held["gradients_host" if fp32 and offload else f"gradients_{near}"] += kept
        held[f"buffers_{near}"] += width * (bucket + (overlapping if fp32 else 0))
    else:
        held[f"gradients_{near}"] += _FP32 * elements
        held[f"buffers_{near}"] += _FP32 * (bucket + (overlapping if fp32 else partition))
    if offload:
        largest = width * max(p.elements for group in groups for p in group.parameters)
        held["buffers_host"] += (_FP32 + width) * partition + largest
        held[f"buffers_{near}"] += largest
    return dict(held)


def _owned_tables(
    config: RunConfig, layout: Layout, hardware: HardwareConfig, place: Coordinates, specs: Sequence[TableSpec]
) -> list[_Table]:
    memory, owners, owner = config.memory, layout.stage_size, place.rank % layout.stage_size
    state = build_row_optimizer(memory.optimizer)
    shares = [
        disk_bytes(
            spec,
            owners=owners,
            owner=owner,
            storage=memory.storage_of(spec.name),
            state_fields=state.state_fields(spec.width),
        )
        for spec in specs
    ]
    cache_bytes = memory.disk.cache_gib * 2**30 / max(1, sum(shares))
    tables = []
    for spec in specs:
        storage, rows = memory.storage_of(spec.name), len(owner_range(spec.rows, owners, owner))
        held: Counter[str] = Counter()
        parts = (
            (storage.tier, row_fields(storage.format, spec.width)),
            (storage.tier_of_state, (*state.state_fields(spec.width), TOUCHED)),
        )
        for tier, fields in parts:
            size = rows * record_bytes(fields)
            if tier == "disk":
                held.update(planned_bytes(fields, rows, cache_bytes=int(cache_bytes * size)))
            else:
                held["device" if tier == "device" and hardware.on_gpu else "host"] += size
        tables.append(_Table(spec, dict(held), rows))
    return tables


def _peak(
    held: dict[str, int],
    parameters: Sequence[Parameter],
    groups: Sequence[_Group],
    config: RunConfig,
    layout: Layout,
    hardware: HardwareConfig,
    work: Work,
    place: Coordinates,
    working_sets: int,
) -> tuple[dict[str, int], str]:
    near = "device" if hardware.on_gpu else "host"
    offload, second = config.optimizer.offload == "host", config.optimizer.zero_stage == 2
    elements = [p.elements for p in parameters]
    bucket = _FP32 * min(BUCKET_ELEMENTS, sum(elements))
    copied = bucket if layout.dp * layout.cp > 1 else 0
    partitions = [_FP32 * group.partition for group in groups]
    gradients = held.get(f"gradients_{near}", 0)
    logits = 0
    if place.pp == layout.pp - 1:
        tokens = work.micro_batch_size * work.seq_length // layout.cp
        logits = tokens * config.model.padded_vocab_size // layout.tp * work.element_bytes
    passing = gradients + held.get(f"activations_{near}", 0) + logits + work.element_bytes * max(elements)
    averaged, flat = (0, 0) if offload and hardware.on_gpu else (sum(partitions), max(partitions))
    moments = {
        "forward and backward": passing + (bucket + copied if second else 0),
        "reduce": (gradients if second else max(0, gradients - averaged)) + averaged + bucket + copied,
        "step": averaged + flat,
    }
    moment = max(moments, key=lambda name: moments[name])
    lasting = Counter({near: working_sets, "host": 0})
    for key, size in held.items():
        part, _, where = key.rpartition("_")
        if part in _LASTING or where != near:
            lasting[where] += size
    share = 1 + hardware.ceilings.fragmentation
    if hardware.on_gpu:
        lasting[near] += math.ceil(share * moments[moment])
    else:
        weights = sum(_FP32 * n for n in elements if _FP32 * n >= _HEAP_LIMIT)
        largest, softmax = work.element_bytes * max(elements), 2 * logits + logits * _FP32 // work.element_bytes
        big = weights + (largest if largest >= _HEAP_LIMIT else 0) + (softmax if logits >= _HEAP_LIMIT else 0)
        before_flat = _FP32 * sum(elements) - weights
        heap = max(passing - min(big, passing), before_flat)
        blocks = {
            "forward and backward": [big, *([bucket, copied] if second else [])],
            "reduce": [bucket, copied, *partitions],
            "step": [*partitions, max(partitions)],
            "gather": [work.element_bytes * max((group.flat for group in groups if group.shards > 1), default=0)],
        }
        large = {name: sum(n for n in sizes if n >= _HEAP_LIMIT) for name, sizes in blocks.items()}
        grown = max(sum(sizes) - large[name] for name, sizes in blocks.items() if name in ("reduce", "step"))
        moment = max(large, key=lambda name: large[name])
        lasting[near] += math.ceil(share * heap) + grown + large[moment]
    return {where: size for where, size in lasting.items() if size}, moment
