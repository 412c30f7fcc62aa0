"""Layout arithmetic: ranks, coordinates, layers of stages, owners of rows. Pure functions of integers.

Ranks are ordered as megatron-core orders them (``tp-cp-ep-dp-pp``): tensor-parallel fastest, then context, data, pipeline.
Experts are spread over the ranks of a stage anew: expert-tensor-parallel fastest, then expert-parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamem.errors import ConfigError
from megamem.parallel.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism of a world; every method is arithmetic on them."""

    world_size: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    """Context parallel: ranks that share every sequence."""
    etp: int = 0
    """Tensor parallel size inside experts; 0 becomes ``tp``."""
    vpp: int = 1
    """Virtual stages: chunks of layers per pipeline stage; 1 does not interleave."""
    first_stage_layers: int = 0
    """Layers of the first pipeline stage where stages are uneven; 0 for a share like the others'."""
    last_stage_layers: int = 0
    """Layers of the last pipeline stage, likewise."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "etp", self.etp or self.tp)
        model = self.tp * self.pp * self.cp
        if self.world_size % model:
            context = f" x parallel.context_parallel_size={self.cp}" if self.cp > 1 else ""
            raise ConfigError(
                f"a world of {self.world_size} ranks does not fit parallel.tensor_model_parallel_size={self.tp} x "
                f"parallel.pipeline_model_parallel_size={self.pp}{context}; start a multiple of {model} ranks, by "
                "parallel.nproc on this machine, by nodes or ranks_per_node on a cluster"
            )
        if self.stage_size % (self.etp * self.ep):
            experts = f"parallel.expert_model_parallel_size={self.ep}"
            if self.etp != self.tp:
                experts += f" x parallel.expert_tensor_parallel_size={self.etp}"
                ranks = f"{self.stage_size} ranks of a pipeline stage"
            else:
                ranks = f"{self.dp * self.cp} data-parallel ranks"
            raise ConfigError(
                f"{experts} does not divide the {ranks} (world {self.world_size} / tensor {self.tp} / pipeline {self.pp}); "
                "set it to one of their divisors"
            )

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> Layout:
        """The layout of ``config`` on ``world_size`` ranks; ConfigError where it does not fit."""
        return cls(
            world_size=world_size,
            tp=config.tensor_model_parallel_size,
            pp=config.pipeline_model_parallel_size,
            ep=config.expert_model_parallel_size,
            cp=config.context_parallel_size,
            etp=config.expert_tensor_parallel_size,
            vpp=config.virtual_pipeline_model_parallel_size,
            first_stage_layers=config.num_layers_in_first_pipeline_stage,
            last_stage_layers=config.num_layers_in_last_pipeline_stage,
        )

    @property
    def dp(self) -> int:
        """Data-parallel size: groups of ranks that see different sequences."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage: the size of a memory group."""
        return self.tp * self.cp * self.dp

    @property
    def slices(self) -> int:
        """Slices of every sequence, one for each rank that shares it: context-parallel parts, cut once more over ``tp``."""
        return self.cp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands on every axis."""
        in_stage = rank % self.stage_size
        return Coordinates(
            rank=rank,
            tp=rank % self.tp,
            cp=rank // self.tp % self.cp,
            dp=in_stage // self.slices,
            pp=rank // self.stage_size,
            ep=in_stage // self.etp % self.ep,
            etp=in_stage % self.etp,
            slice=in_stage % self.slices,
        )

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def memory_group(self, pp: int) -> list[int]:
        """Ranks over which the tables of pipeline stage ``pp`` are sharded: all ranks of that stage."""
        return list(range(pp * self.stage_size, (pp + 1) * self.stage_size))

    def chunk_layers(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """Zero-based layers of one chunk of a pipeline stage, as megatron-core deals them out: chunk 0 of every stage, then
        chunk 1 of every stage, and so on.

        Raises:
            ConfigError: ``num_layers`` cannot be dealt out so.
        """
        sizes = self._chunk_sizes(num_layers)
        start = chunk * sum(sizes) + sum(sizes[:stage])
        return range(start, start + sizes[stage])

    def stage_layers(self, num_layers: int, stage: int) -> list[int]:
        """Zero-based layers of all chunks of a pipeline stage; errors as in :meth:`chunk_layers`."""
        return [layer for chunk in range(self.vpp) for layer in self.chunk_layers(num_layers, stage, chunk)]

    def _chunk_sizes(self, num_layers: int) -> list[int]:
        """Layers of one chunk of every stage."""
        ends = {0: self.first_stage_layers, self.pp - 1: self.last_stage_layers}
        sizes = [ends.get(stage, 0) for stage in range(self.pp)]
        rest, even = num_layers - sum(sizes), sizes.count(0)
        # Every layer has a place, and every stage has a layer.
        if rest % even or rest < even if even else rest:
            raise ConfigError(self._uneven(num_layers))
        sizes = [size or rest // even for size in sizes]
        for stage, size in enumerate(sizes):
            if size % self.vpp:
                raise ConfigError(
                    f"pipeline stage {stage} has {size} of model.num_layers={num_layers} layers, not a multiple of "
                    f"parallel.virtual_pipeline_model_parallel_size={self.vpp}; set one to fit the other"
                )
        return [size // self.vpp for size in sizes]

    def _uneven(self, num_layers: int) -> str:
        stages = f"parallel.pipeline_model_parallel_size={self.pp}"
        if not (self.first_stage_layers or self.last_stage_layers):
            return f"model.num_layers={num_layers} is not a multiple of {stages}; set one to a multiple of the other"
        return (
            f"model.num_layers={num_layers} cannot be dealt out to {stages} stages with "
            f"parallel.num_layers_in_first_pipeline_stage={self.first_stage_layers} and "
            f"parallel.num_layers_in_last_pipeline_stage={self.last_stage_layers}: the stages between must get the same "
            "number each, at least 1; set them to fit"
        )


@dataclass(frozen=True, slots=True)
class Coordinates:
    """One rank's place in a :class:`Layout`."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    slice: int
    """Which of :attr:`Layout.slices` of every sequence it works on outside the tensor-parallel regions: ``cp * tp_size + tp``."""


def owner_range(rows: int, owners: int, owner: int) -> range:
    """Rows of a table that ``owner`` stores: contiguous ranges of equal size, the last ones shorter or empty."""
    size = rows_per_owner(rows, owners)
    return range(min(owner * size, rows), min((owner + 1) * size, rows))


def rows_per_owner(rows: int, owners: int) -> int:
    """Length of a full owner range: the owner of ``row`` is ``row // rows_per_owner(rows, owners)``."""
    return -(-rows // owners)
