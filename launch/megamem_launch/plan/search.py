"""A plan of one layout, and all layouts of a cluster ranked by the tokens they are estimated to train on per second."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamem.errors import ConfigError
from megamem.memory.spec import TableSpec
from megamem.observe.accounting import PLACES
from megamem.observe.flops import training_flops
from megamem.observe.progress import format_bytes
from megamem.parallel.layout import Layout
from megamem_launch.cluster import Cluster
from megamem_launch.config import RunConfig
from megamem_launch.plan.memory import RankMemory, model_tables, plan_memory, precision_on, stage_tables, work_of
from megamem_launch.plan.time import Machine, StepTime, plan_time
from megamem_launch.plan.traffic import plan_traffic
from megamem_launch.validate import validate

_GIB = 2**30
_RECOMPUTE = ("none", "selective", "full")
_VARIED = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.expert_model_parallel_size",
    "parallel.sequence_parallel",
    "optimizer.zero_stage",
    "train.micro_batch_size",
    "train.recompute",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one layout takes, per rank, node and step."""

    config: RunConfig
    layout: Layout
    ranks: list[RankMemory]
    """The first rank of every stage."""
    traffic: list[dict[str, float]]
    """Bytes that a rank sends per step, by stage and wire."""
    time: StepTime | None
    """None where the hardware has no ceilings."""
    refusals: list[str]
    """Why it does not fit: one sentence for each kind of memory that is short."""
    flops_per_token: float
    world_size: int

    @property
    def fits(self) -> bool:
        """Whether every kind of memory suffices."""
        return not self.refusals

    @property
    def settings(self) -> list[str]:
        """The settings that :func:`candidates` varies, as overrides of the command line."""
        return [f"{name}={_plain(value)}" for name in _VARIED if (value := _get(self.config, name)) is not None]

    @property
    def tokens_per_second(self) -> float:
        """Estimate over all ranks; 0 without ceilings."""
        return self.time.tokens_per_second if self.time else 0.0

    def peak(self, place: str) -> int:
        """The most that any rank holds there at any moment, in bytes."""
        return max(rank.peak.get(place, 0) for rank in self.ranks)

    def utilisation(self, peak_tflops: float) -> float:
        """Model FLOP utilisation against a peak per rank; 0 where either is not known."""
        if not peak_tflops:
            return 0.0
        return self.tokens_per_second * self.flops_per_token / (self.world_size * peak_tflops * 1e12)


def plan(config: RunConfig, cluster: Cluster, *, cores: int = 0, known: Sequence[TableSpec] | None = None) -> Plan:
    """Plan ``config`` on all ranks of ``cluster``; ``cores`` of a node where they are fewer than its ranks. ``known``: the tables
    of the model, where a caller has them from :func:`~megamem_launch.plan.memory.model_tables`.

    Raises:
        ConfigError: the layout does not fit the model or the number of ranks, or ``model.vocab_size`` is not known.
    """
    if not config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size is 0, and no prepared data says how large the vocabulary is; set it, or data.path"
        )
    layout = validate(config, cluster.world_size)
    hardware, stages = cluster.hardware, range(layout.pp)
    known = model_tables(config) if known is None else known
    ranks = plan_memory(config, layout, hardware, tables=known)
    work = work_of(config, layout, hardware)
    tables = [stage_tables(known, config, layout, stage) for stage in stages]
    traffic = [plan_traffic(config, layout, work, stage, tables[stage]) for stage in stages]
    time = None
    if hardware.ceilings.compute:
        machine = Machine(
            hardware,
            ranks=cluster.ranks_per_node,
            cores=cores or cluster.cpus_per_node,
            precision=precision_on(config, hardware),
            nodes=cluster.nodes,
        )
        time = plan_time(config, layout, work, machine, tables=tables, traffic=traffic)
    return Plan(
        config=config,
        layout=layout,
        ranks=ranks,
        traffic=traffic,
        time=time,
        refusals=list(_refusals(ranks, layout, cluster)),
        flops_per_token=training_flops(config.model, config.memory, config.data.seq_length),
        world_size=cluster.world_size,
    )


def candidates(config: RunConfig, cluster: Cluster, *, cores: int = 0) -> Iterator[Plan]:
    """Plans of all layouts that the model and the ranks allow, as the global batch stays what it is. Tensor, context and expert
    parallelism stay within a node, where their collectives are cheap enough to stand in the way of every layer."""
    world, node = cluster.world_size, cluster.ranks_per_node
    heads, known = config.model.num_attention_heads, model_tables(config)
    for tp in _divisors(min(node, heads)):
        for cp in _divisors(node // tp):
            for pp in _divisors(world // (tp * cp)):
                if pp > config.model.num_layers:
                    continue
                for values in _inner(config, cluster, tp, cp, pp):
                    changed = copy.deepcopy(config)
                    for name, value in values.items():
                        _set(changed, name, value)
                    try:
                        yield plan(changed, cluster, cores=cores, known=known)
                    except ConfigError:
                        continue


def best(config: RunConfig, cluster: Cluster, count: int, *, cores: int = 0) -> tuple[list[Plan], int]:
    """The ``count`` fastest layouts that fit, and how many were looked at. Of equally fast ones those that leave more memory come
    first."""
    near = "device" if cluster.hardware.on_gpu else "host"
    plans = list(candidates(config, cluster, cores=cores))
    fitting = [one for one in plans if one.fits]
    fitting.sort(key=lambda one: (-round(one.tokens_per_second, 3), one.peak(near)))
    return fitting[:count], len(plans)


def _inner(config: RunConfig, cluster: Cluster, tp: int, cp: int, pp: int) -> Iterator[dict[str, object]]:
    """Settings of what a tensor-, context- and pipeline-parallel size leave open."""
    dp = cluster.world_size // (tp * cp * pp)
    per_rank = config.train.global_batch_size // dp if config.train.global_batch_size % dp == 0 else 0
    layers = config.model.num_layers // pp
    moe = bool(config.model.moe.layers)
    experts = (
        [ep for ep in _divisors(min(cluster.ranks_per_node, dp * cp)) if config.model.moe.num_experts % ep == 0]
        if moe
        else [1]
    )
    chunks = [1, *(v for v in (2, 4) if pp > 1 and layers % v == 0)]
    for micro in (size for size in (1, 2, 4, 8, 16) if per_rank and per_rank % size == 0):
        for vpp in chunks:
            for ep in experts:
                for stage in (0, 1, 2) if pp == 1 else (0, 1):
                    for recompute in _RECOMPUTE:
                        values = (tp, pp, vpp, cp, ep, tp > 1, stage, micro, recompute)
                        yield dict(zip(_VARIED, values, strict=True))


def _refusals(ranks: Sequence[RankMemory], layout: Layout, cluster: Cluster) -> Iterator[str]:
    hardware = cluster.hardware
    limits = {
        "device": (hardware.device_memory_gib, 1, "hardware.device_memory_gib"),
        "host": (hardware.host_memory_gib, cluster.ranks_per_node, "hardware.host_memory_gib"),
        "disk": (hardware.disk_gib, cluster.ranks_per_node, "hardware.disk_gib"),
    }
    for place in PLACES:
        limit, per_node, name = limits[place]
        # Ranks are numbered stage after stage, so a node may hold only ranks of the fullest one.
        worst = max(ranks, key=lambda rank: rank.peak.get(place, 0))
        wanted = worst.peak.get(place, 0) * per_node
        if limit and wanted > limit * _GIB:
            part = max(
                (key for key in worst.held if key.endswith(f"_{place}")), key=lambda key: worst.held[key], default=place
            )
            whose = (
                f"a rank of stage {layout.coordinates(worst.rank).pp}"
                if per_node == 1
                else f"{per_node} ranks of a node"
            )
            share = worst.held.get(part, 0) * per_node
            yield (
                (
                    f"{whose} want {format_bytes(wanted)} of {place} memory, of which {part.rpartition('_')[0]} take "
                    f"{format_bytes(share)}, and {name} allows {limit:,.1f} GiB"
                )
                .replace("rank of stage 0 want", "rank of stage 0 wants")
                .replace("disk memory", "disk")
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _get(config: RunConfig, name: str) -> object:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def _set(config: RunConfig, name: str, value: object) -> None:
    section, _, field = name.partition(".")
    setattr(getattr(config, section), field, value)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
