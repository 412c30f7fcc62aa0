"""A plan of one layout, and all layouts of a cluster ranked by the tokens they are estimated to train on per second."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megamem.errors import ConfigError
from megamem.observe.accounting import PLACES
from megamem.observe.flops import training_flops
from megamem.observe.progress import format_bytes
from megamem.parallel.layout import Layout
from megamem_launch.cluster import Cluster
from megamem_launch.config import RunConfig
from megamem_launch.plan.memory import RankMemory, model_tables, plan_memory, precision_on, stage_tables, work_of
from megamem_launch.plan.parameters import StageShapes
from megamem_launch.plan.rates import Machine
from megamem_launch.plan.time import StepTime, plan_time
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
        """The settings that :meth:`Planner.candidates` varies, as overrides of the command line."""
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


class Planner:
    """Plans layouts of one model on one cluster; what no layout changes is worked out once.

    Args:
        config: ``model.vocab_size`` must be set.
        cluster: All of whose ranks are used.
        cores: Of a node, where they are fewer than its ranks; 0 for ``cluster.cpus_per_node``.

    Raises:
        ConfigError: the size of the vocabulary is not known, or ceilings lack the precision that is trained in.
    """

    def __init__(self, config: RunConfig, cluster: Cluster, *, cores: int = 0) -> None:
        if not config.model.vocab_size:
            raise ConfigError(
                "model.vocab_size is 0, and no prepared data says how large the vocabulary is; set it, or data.path"
            )
        self._config, self._cluster = config, cluster
        self._tables = model_tables(config)
        self._shapes = StageShapes(config.model, config.memory)
        self._machine: Machine | None = None
        if cluster.hardware.ceilings.compute:
            self._machine = Machine(
                cluster.hardware,
                ranks=cluster.ranks_per_node,
                cores=cores or cluster.cpus_per_node,
                precision=precision_on(config, cluster.hardware),
                nodes=cluster.nodes,
            )

    def plan(self, config: RunConfig, layout: Layout, *, time_misfits: bool = True) -> Plan:
        """Plan the model in the layout that :func:`validate` gave for ``config``. Unless ``time_misfits``, what does not fit gets
        neither traffic nor time."""
        cluster, hardware, stages = self._cluster, self._cluster.hardware, range(layout.pp)
        ranks = plan_memory(config, layout, hardware, tables=self._tables, shapes=self._shapes)
        refusals = list(_refusals(ranks, layout, cluster))
        traffic: list[dict[str, float]] = []
        time = None
        if time_misfits or not refusals:
            work = work_of(config, layout, hardware)
            tables = [stage_tables(self._tables, config, layout, stage) for stage in stages]
            parameters = [self._shapes.of(layout, stage) for stage in stages]
            traffic = [plan_traffic(config, layout, work, s, tables[s], parameters[s]) for s in stages]
            if self._machine is not None:
                time = plan_time(
                    config, layout, work, self._machine, tables=tables, traffic=traffic, parameters=parameters
                )
        return Plan(
            config=config,
            layout=layout,
            ranks=ranks,
            traffic=traffic,
            time=time,
            refusals=refusals,
            flops_per_token=training_flops(config.model, config.memory, config.data.seq_length),
            world_size=cluster.world_size,
        )

    def candidates(self) -> Iterator[Plan]:
        """Plans of all layouts that the model and the ranks allow, as the global batch stays what it is. Tensor, context and expert
        parallelism stay within a node, where their collectives are cheap enough to stand in the way of every layer."""
        config, cluster = self._config, self._cluster
        world, node = cluster.world_size, cluster.ranks_per_node
        for tp in _divisors(min(node, config.model.num_attention_heads)):
            for cp in _divisors(node // tp):
                for pp in _divisors(world // (tp * cp)):
                    if pp > config.model.num_layers:
                        continue
                    for values in _inner(config, cluster, tp, cp, pp):
                        changed = _with(config, values)
                        try:
                            layout = validate(changed, world)
                        except ConfigError:
                            continue
                        yield self.plan(changed, layout, time_misfits=False)

    def nodes_that_fit(self, config: RunConfig) -> int:
        """The least power of two times the cluster's nodes, up to 16, on which ``config`` fits in its own layout; 0 for none."""
        for factor in (2, 4, 8, 16):
            cluster = dataclasses.replace(self._cluster, nodes=factor * self._cluster.nodes)
            try:
                layout = validate(config, cluster.world_size)
            except ConfigError:
                continue
            ranks = plan_memory(config, layout, cluster.hardware, tables=self._tables, shapes=self._shapes)
            if not any(_refusals(ranks, layout, cluster)):
                return cluster.nodes
        return 0

    def best(self, count: int) -> tuple[list[Plan], int]:
        """The ``count`` fastest layouts that fit (without ceilings, the smallest), and how many were looked at. Of equally fast
        ones those that leave more memory come first."""
        near = "device" if self._cluster.hardware.on_gpu else "host"
        plans = list(self.candidates())
        fitting = [one for one in plans if one.fits]
        fitting.sort(key=lambda one: (-round(one.tokens_per_second, 3), one.peak(near)))
        return fitting[:count], len(plans)


def plan(config: RunConfig, cluster: Cluster, *, cores: int = 0) -> Plan:
    """Plan ``config`` on all ranks of ``cluster``, see :class:`Planner`; ConfigError also for a layout that does not fit the
    model or the number of ranks."""
    return Planner(config, cluster, cores=cores).plan(config, validate(config, cluster.world_size))


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
                    f"{format_bytes(share)}, and {name} allows {format_bytes(limit * _GIB)}"
                )
                .replace("rank of stage 0 want", "rank of stage 0 wants")
                .replace("disk memory", "disk")
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _get(config: RunConfig, name: str) -> object:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def _with(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """``config`` with other values; sections without any are shared."""
    changed = copy.copy(config)
    for name in {name.partition(".")[0] for name in values}:
        setattr(changed, name, copy.copy(getattr(config, name)))
    for name, value in values.items():
        section, _, field = name.partition(".")
        setattr(getattr(changed, section), field, value)
    return changed


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
