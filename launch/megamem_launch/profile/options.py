"""What ``megamem profile`` was asked for. Needs no torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from megamem.errors import ConfigError
from megamem_launch.config import RunConfig

SCRATCH = "scratch"
"""Directory below the profile's own that tables on disk and a timed checkpoint are written to, and that goes with the ranks."""
UNDER_NSYS = "MEGAMEM_UNDER_NSYS"
"""Environment variable of a process that Nsight Systems runs already."""


@dataclass(frozen=True, slots=True)
class Options:
    """Besides the configuration."""

    out: Path
    """Directory of what is written."""
    warmup: int = 3
    steps: int = 10
    traced: int = 2
    peak_tflops: float = 0.0
    """Of one rank's device; 0: not known."""
    peak_source: str = ""
    """Where that number comes from."""
    cluster: str = ""
    """File whose peaks the points of a sweep take, each that of its own precision; empty for none."""
    checkpoint: bool = False
    nsys: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 1:
            raise ConfigError(f"--warmup is {self.warmup} and --steps {self.steps}; set 1 or more of each")
        if self.traced < 0:
            raise ConfigError(f"--traced is {self.traced}; set 0 for no trace, or the steps of one")
        if self.peak_tflops < 0:
            raise ConfigError(f"--peak-tflops is {self.peak_tflops:g}; set what the device's data sheet says")


def scratch_config(config: RunConfig, out: Path, steps: int) -> RunConfig:
    """``config`` for ``steps`` steps that leave nothing behind: no evaluation, no checkpoint, a constant learning rate, and a
    directory below ``out`` in place of the run's. Shapes, layout and data are those of the run."""
    scratch = copy.deepcopy(config)
    scratch.runs_dir, scratch.name = str(out), SCRATCH
    scratch.train.steps, scratch.train.eval_batches = steps, 0
    scratch.optimizer.schedule, scratch.optimizer.warmup_steps = "constant", 0
    scratch.checkpoint.interval = 0
    return scratch
