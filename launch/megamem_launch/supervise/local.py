"""This machine as a place for ranks, without SLURM."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamem.errors import LaunchError
from megamem_launch.cluster import Cluster
from megamem_launch.slurm.parse import Job
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.supervise import rendezvous
from megamem_launch.supervise.allocation import environment_of
from megamem_launch.supervise.findings import Findings
from megamem_launch.supervise.incarnation import Incarnation
from megamem_launch.supervise.steps import LocalStep, Step


@dataclass(slots=True)
class LocalAllocation:
    """Ranks on this machine, without SLURM."""

    cluster: Cluster
    first: Incarnation
    nodes: list[str]
    ends: float = float("inf")

    @classmethod
    def here(cls, cluster: Cluster) -> LocalAllocation:
        """This machine."""
        return cls(cluster, Incarnation(f"local-{os.getpid()}-{time.time():.0f}", 0, 0), [socket.gethostname()])

    def start(self, run_dir: Path, config: Path, incarnation: Incarnation) -> Step:
        endpoint = f"127.0.0.1:{rendezvous.free_port(incarnation)}"
        ranks = str(self.cluster.ranks_per_node)
        command = [sys.executable, "-u", "-m", "megamem_launch.supervise.agent"]
        environment = {name: v for name, v in environment_of(incarnation).items() if not name.startswith("SLURM")}
        return LocalStep([*command, str(run_dir), str(config), endpoint, "1", ranks], environment)

    def examine(self, run_dir: Path, incarnation: Incarnation, interrupted: Callable[[], bool]) -> Findings:
        return Findings()

    def lost_nodes(self, *, probe: bool) -> dict[str, str]:
        return {}

    def job(self, *, patient: bool = True) -> Job | None:
        return None

    def runs(self, job: str) -> bool | None:
        with contextlib.suppress(LaunchError):  # this machine may be a login node
            found = Slurm().job(job)
            return found is not None and not found.over and not found.waiting
        return None
