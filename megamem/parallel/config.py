"""The ``parallel`` section: how many ranks, and what each degree of parallelism takes of them."""

from __future__ import annotations

from dataclasses import dataclass

from megamem.config import at_least
from megamem.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """``parallel``: degrees of parallelism; what they leave of the world is data parallel (with ZeRO-1)."""

    nproc: int = 1
    """Processes that ``megamem train`` starts on this machine; ignored under torchrun or SLURM, which bring their own."""
    tensor_model_parallel_size: int = 1
    """Ranks that share every matrix of a layer."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into (1F1B schedule)."""
    expert_model_parallel_size: int = 1
    """Data-parallel ranks that share the experts of a layer."""
    sequence_parallel: bool = False
    """Split activations outside the tensor-parallel regions along the sequence. Needed by MoE under tensor parallelism."""

    def __post_init__(self) -> None:
        at_least(self, 1, "nproc", "tensor_model_parallel_size", "pipeline_model_parallel_size")
        at_least(self, 1, "expert_model_parallel_size")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("sequence_parallel is true, which needs tensor_model_parallel_size of 2 or more")
