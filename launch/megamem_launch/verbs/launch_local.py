"""``megamem launch local``: a run under its supervisor on this machine, without SLURM."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megamem.config import at_least
from megamem.errors import ConfigError, LaunchError
from megamem_launch.cluster import Cluster, SlurmConfig
from megamem_launch.config import load_config
from megamem_launch.rundir import cancelled_file, next_submission_folder, stop_lies
from megamem_launch.slurm.submit import Submission, claimed, write_submission
from megamem_launch.slurm.training import check_no_jobs
from megamem_launch.supervise.local import LocalAllocation
from megamem_launch.supervise.submission import read_submission
from megamem_launch.supervise.supervisor import Supervisor
from megamem_launch.validate import validate
from megamem_launch.verbs.parse import flags_last, parse


@dataclass
class Arguments:
    """Train on this machine under a supervisor: ranks that crash or hang are started again from the last checkpoint.

    As `megamem launch slurm` does on a cluster: heartbeats, stacks of ranks that hang, one log per rank in RUN/launch/logs. An
    interrupt (or RUN/STOP) saves and stops; a second one ends at once. `megamem launch status RUN` tells how it goes.

    Examples:
      megamem launch local configs/quickstart.yaml
      megamem launch local configs/quickstart.yaml name=try2 --nproc 2
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """YAML file, or the directory of a run."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETTING=VALUE")] = ()
    """Settings to change, as section.setting=value (the value is read as YAML)."""
    nproc: int = 0
    """Ranks; 0 for parallel.nproc."""
    restarts: int = 3
    """Restarts after which the run gives up that has not saved a new checkpoint between them."""
    hang_seconds: int = 300
    """Seconds in which no rank gets on after which all are stopped and started again; 0 waits for ever. A checkpoint may take four
    times as long. Keep it below memory.timeout_seconds, after which ranks fail without saying who was late."""

    start_seconds: int = 900
    """Seconds without progress that ranks may take before their first step is done: imports, compiling, reading a checkpoint."""

    def __post_init__(self) -> None:
        at_least(self, 0, "nproc", "restarts", "hang_seconds")
        at_least(self, 1, "start_seconds")


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, flags_last(Arguments, argv), "launch local")
    config = load_config(arguments.config, arguments.overrides)
    config.runs_dir = str(Path(config.runs_dir).absolute())
    ranks = config.parallel.nproc = arguments.nproc or config.parallel.nproc
    validate(config, ranks)
    if cancelled_file(config.run_dir).exists():
        raise ConfigError(
            f"{config.run_dir} was cancelled; delete {cancelled_file(config.run_dir)} to go on, or give this run another name"
        )
    if stop := stop_lies(config.run_dir):
        raise LaunchError(stop)
    if shutil.which("squeue"):
        check_no_jobs(config.run_dir)
    cluster = Cluster(
        name="this machine",
        ranks_per_node=ranks,
        cpus_per_node=max(ranks, len(os.sched_getaffinity(0))),
        slurm=SlurmConfig(
            restarts=arguments.restarts,
            hang_seconds=arguments.hang_seconds,
            start_seconds=arguments.start_seconds,
            requeue=False,
            preflight=False,
        ),
    )
    submission = Submission(
        run_dir=config.run_dir,
        config=config,
        cluster=cluster,
        kind="local",
        world_size=ranks,
        overrides=tuple(arguments.overrides),
    )
    folder = next_submission_folder(config.run_dir)
    with claimed(config.run_dir, folder):
        write_submission(submission, folder, {})
    return Supervisor(read_submission(folder), LocalAllocation.here(cluster)).run()
