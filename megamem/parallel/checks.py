"""Whether optimizer and layout fit each other: checks across sections, before anything is built. Needs no torch."""

from __future__ import annotations

from megamem.errors import ConfigError
from megamem.parallel.layout import Layout
from megamem.train.config import OptimizerConfig


def check_zero(optimizer: OptimizerConfig, layout: Layout) -> None:
    """Raise ConfigError for a ZeRO stage that ``layout`` rules out.

    Stage 2 reduces gradients in every backward pass. Pipeline stages run many of them per step, each beside the forward pass of
    another micro-batch, and share a tied embedding whose gradient must be summed before it is cut into partitions.
    """
    if optimizer.zero_stage == 2 and layout.pp > 1:
        raise ConfigError(
            f"optimizer.zero_stage=2 reduces gradients in every backward pass, which pipelining "
            f"(parallel.pipeline_model_parallel_size={layout.pp}) would repeat for each micro-batch and which cuts a tied "
            "embedding before its two stages have summed it; set optimizer.zero_stage=1, or pipeline_model_parallel_size=1"
        )
