"""``megamem train``: check the configuration, then train here or through torchrun."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from megamem.errors import ConfigError, LaunchError
from megamem_launch.config import RunConfig, load_config
from megamem_launch.rundir import stop_lies
from megamem_launch.torchrun import run_ranks
from megamem_launch.validate import validate
from megamem_launch.verbs.parse import flags_last, parse, print_settings


@dataclass
class Arguments:
    """Train a model from a configuration, or go on where its run stopped.

    A run lives in RUNS_DIR/NAME. When that directory already holds a checkpoint the run continues from it, bit for bit;
    the configuration must then describe the same model and data. With parallel.nproc above 1 the ranks are started with
    torchrun on this machine; `megamem launch` supervises them, here or on SLURM, and under a torchrun of your own start
    `torchrun -m megamem_launch.pretrain CONFIG`. A file RUNS_DIR/NAME/SAVE that you touch saves at once, STOP saves and ends.

    Examples:
      megamem train configs/quickstart.yaml
      megamem train configs/quickstart.yaml name=try2 train.steps=50 memory.engram.width=16
      megamem train runs/try2 train.steps=100
      megamem train configs/quickstart.yaml parallel.nproc=2 parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = ""
    """YAML file, or the directory of a run."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETTING=VALUE")] = ()
    """Settings to change, as section.setting=value (the value is read as YAML)."""
    settings: bool = False
    """Print every setting with its default and what it means, and stop."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, flags_last(Arguments, argv), "train")
    if arguments.settings:
        print_settings(RunConfig)
        return 0
    if not arguments.config:
        raise ConfigError("no configuration is given; name a YAML file or the directory of a run (see --help)")
    config = load_config(arguments.config, arguments.overrides)
    if "WORLD_SIZE" not in os.environ and (stop := stop_lies(config.run_dir)):
        raise LaunchError(stop)
    if "WORLD_SIZE" not in os.environ and config.parallel.nproc > 1:
        return _torchrun(config, [arguments.config, *arguments.overrides])
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))  # before seconds of imports
    from megamem_launch.run import pretrain

    pretrain(config)
    return 0


def _torchrun(config: RunConfig, arguments: list[str]) -> int:
    """Start the ranks on this machine with torchrun's library; the exit code is that of the first rank that failed."""
    validate(config, config.parallel.nproc)
    from megamem_launch.compose import check_start, open_data

    data = open_data(config, verify=False)  # the ranks do, each its share
    check_start(config, data)
    failure = run_ranks(config.parallel.nproc, "megamem_launch.pretrain", arguments)
    if failure is None:
        return 0
    if failure.text:
        print(f"megamem train: {failure.text}; the same command goes on from the last checkpoint", file=sys.stderr)
    return failure.code
