"""Ends a cluster when the process that owns it ends, even by SIGKILL: ``python -m ...keeper OWNER_PID DIRECTORY``."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

from megamem.testing.slurm_cluster import processes


def start(directory: Path) -> subprocess.Popen[bytes]:
    """Let this process own the cluster in ``directory``. The keeper outlives a SIGKILL of the owner's process group."""
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid()), str(directory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(root)},
        start_new_session=True,
    )


def main(owner: int, directory: Path) -> None:
    """Wait for the owner's end, then kill every process of the cluster."""
    descriptor = os.pidfd_open(owner)
    if os.getppid() == owner:  # else it ended before there was a descriptor, and its number may be another's
        select.select([descriptor], [], [])
    processes.kill(directory)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
