"""``megamem launch``: hands its actions to the modules that do them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from megamem_launch.verbs.parse import parse, print_settings

_MODULES = {
    "slurm": "launch_slurm",
    "data": "launch_slurm",
    "local": "launch_local",
    "status": "launch_jobs",
    "logs": "launch_jobs",
    "cancel": "launch_jobs",
    "requeue": "launch_jobs",
    "history": "launch_jobs",
}


@dataclass
class Arguments:
    """Submit, supervise, watch and end runs.

      slurm    submit a run, a chain of jobs or a sweep to SLURM
      data     prepare a corpus with an array of SLURM jobs
      local    train on this machine under a supervisor, which restarts what crashes or hangs
      status   one screen: waiting, running, finished or failed, and why
      logs     the output of all ranks
      cancel   end a run for good
      requeue  let a run start again
      history  every start of a run: when, where, how it ended

    `megamem launch ACTION --help` teaches each.

    Examples:
      megamem launch slurm my.yaml --cluster configs/clusters/slurm_8xh100.yaml --nodes 4 --time 12:00:00 --dry-run
      megamem launch slurm my.yaml --cluster my_cluster.yaml --chain 5
      megamem launch local my.yaml --nproc 2
      megamem launch status runs/mine
      megamem launch --settings
    """

    action: Annotated[
        Literal["slurm", "data", "local", "status", "logs", "cancel", "requeue", "history"], tyro.conf.Positional
    ]
    """What to do."""
    settings: bool = False
    """Print every setting of a cluster file with its default and what it means, and stop."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    if argv == ["--settings"]:
        from megamem_launch.cluster import Cluster

        print_settings(Cluster)
        return 0
    if not argv or argv[0] not in _MODULES:
        parse(Arguments, argv[:1], "launch")  # ends the process: help, or what is wrong
    action, rest = argv[0], argv[1:]
    module = importlib.import_module(f"megamem_launch.verbs.{_MODULES[action]}")
    return int(module.main(rest) if action == "local" else module.main(action, rest))
