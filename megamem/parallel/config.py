"""The ``parallel`` section: how many ranks, and what each degree of parallelism takes of them."""

from __future__ import annotations

from dataclasses import dataclass

from megamem.config import at_least
from megamem.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """``parallel``: degrees of parallelism; what they leave of the world is data parallel."""

    nproc: int = 1
    """Processes that ``megamem train`` starts on this machine; ignored under torchrun or SLURM, which bring their own."""
    tensor_model_parallel_size: int = 1
    """Ranks that share every matrix of a layer."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into (1F1B schedule)."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers that each stage holds (interleaved 1F1B): smaller bubbles, more messages. 1 does not interleave."""
    num_layers_in_first_pipeline_stage: int = 0
    """Layers of the first stage where stages are uneven; 0 for the same number as the stages between."""
    num_layers_in_last_pipeline_stage: int = 0
    """Layers of the last stage where stages are uneven; 0 for the same number as the stages between."""
    context_parallel_size: int = 1
    """Ranks that share every sequence: each holds a contiguous part, and attention gathers keys and values of all."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int = 0
    """Ranks that share every matrix of an expert; 0 takes ``tensor_model_parallel_size``."""
    sequence_parallel: bool = False
    """Split activations outside the tensor-parallel regions along the sequence. Needed by MoE under tensor parallelism."""

    def __post_init__(self) -> None:
        at_least(
            self, 1, "nproc", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
        )
        at_least(self, 1, "expert_model_parallel_size", "virtual_pipeline_model_parallel_size")
        at_least(self, 0, "expert_tensor_parallel_size")
        at_least(self, 0, "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("sequence_parallel is true, which needs tensor_model_parallel_size of 2 or more")
        if self.pipeline_model_parallel_size == 1:
            for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name} is {getattr(self, name)}, which needs pipeline_model_parallel_size of 2 or more"
                    )
            if self.virtual_pipeline_model_parallel_size > 1:
                raise ConfigError(
                    f"virtual_pipeline_model_parallel_size is {self.virtual_pipeline_model_parallel_size}, which "
                    "interleaves the stages of a pipeline; set pipeline_model_parallel_size to 2 or more"
                )
