"""Layout arithmetic: ranks, coordinates, layers of stages, owners of rows. Pure functions of integers.

Ranks are ordered as megatron-core orders them (``tp-cp-ep-dp-pp``): tensor-parallel fastest, then data, then pipeline.
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

    def __post_init__(self) -> None:
        model = self.tp * self.pp
        if self.world_size % model:
            raise ConfigError(
                f"a world of {self.world_size} ranks does not fit parallel.tensor_model_parallel_size={self.tp} x "
                f"parallel.pipeline_model_parallel_size={self.pp}; start a multiple of {model} ranks"
            )
        if self.dp % self.ep:
            raise ConfigError(
                f"parallel.expert_model_parallel_size={self.ep} does not divide the {self.dp} data-parallel ranks "
                f"(world {self.world_size} / tensor {self.tp} / pipeline {self.pp}); set it to one of their divisors"
            )

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> Layout:
        """The layout of ``config`` on ``world_size`` ranks; ConfigError where it does not fit."""
        return cls(
            world_size=world_size,
            tp=config.tensor_model_parallel_size,
            pp=config.pipeline_model_parallel_size,
            ep=config.expert_model_parallel_size,
        )

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tp * self.pp)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage: the size of a memory group."""
        return self.tp * self.dp

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands on every axis."""
        tp = rank % self.tp
        dp = rank // self.tp % self.dp
        return Coordinates(rank=rank, tp=tp, dp=dp, pp=rank // self.stage_size, ep=dp % self.ep)

    def rank(self, *, tp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates."""
        return tp + self.tp * (dp + self.dp * pp)

    def memory_group(self, pp: int) -> list[int]:
        """Ranks over which the tables of pipeline stage ``pp`` are sharded: all ranks of that stage."""
        return list(range(pp * self.stage_size, (pp + 1) * self.stage_size))


@dataclass(frozen=True, slots=True)
class Coordinates:
    """One rank's place in a :class:`Layout`."""

    rank: int
    tp: int
    dp: int
    pp: int
    ep: int


def stage_layers(num_layers: int, stages: int, stage: int) -> range:
    """Zero-based layers that pipeline stage ``stage`` of ``stages`` holds."""
    if num_layers % stages:
        raise ConfigError(
            f"model.num_layers={num_layers} is not a multiple of parallel.pipeline_model_parallel_size={stages}; "
            "set one to a multiple of the other"
        )
    per_stage = num_layers // stages
    return range(stage * per_stage, (stage + 1) * per_stage)


def owner_range(rows: int, owners: int, owner: int) -> range:
    """Rows of a table that ``owner`` stores: contiguous ranges of equal size, the last ones shorter or empty."""
    size = rows_per_owner(rows, owners)
    return range(min(owner * size, rows), min((owner + 1) * size, rows))


def rows_per_owner(rows: int, owners: int) -> int:
    """Length of a full owner range: the owner of ``row`` is ``row // rows_per_owner(rows, owners)``."""
    return -(-rows // owners)
