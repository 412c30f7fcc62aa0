"""Who may write a run: one incarnation at a time.

The lease is a file that names the incarnation. A supervisor takes it before it starts ranks; ranks look at it before they publish
a checkpoint (:func:`megamem_launch.rundir.check_lease`). So ranks that live on, on a node that lost its network, cannot write into
the run that was meanwhile started elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamem.errors import LaunchError
from megamem.observe.heartbeat import start_tick
from megamem_launch import rundir
from megamem_launch.supervise.incarnation import Incarnation

_SILENT = 60.0  # seconds without a heartbeat after which an incarnation that cannot be asked for counts as gone
_PATIENCE = 60.0  # seconds that the holder gets to end: a job that was cancelled takes KillWait


def take(
    run_dir: Path,
    incarnation: Incarnation,
    job_runs: Callable[[str], bool | None],
    *,
    patience: float = _PATIENCE,
) -> None:
    """Make ``incarnation`` the one that writes the run.

    ``job_runs`` says of another job's id whether it still runs, None where nobody knows. LaunchError where the holder lives on for
    ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while (held := _try(run_dir, incarnation, job_runs)) is not None:
        if time.monotonic() > deadline:
            raise LaunchError(
                f"incarnation {held['incarnation']} on {held['host']} (pid {held['pid']}) is writing {run_dir}; cancel it, or wait "
                "until it ends, or give this run another name"
            )
        time.sleep(1.0)


def _try(run_dir: Path, incarnation: Incarnation, job_runs: Callable[[str], bool | None]) -> dict[str, Any] | None:
    """Take the lease; else the one that stands in the way."""
    path = rundir.lease_file(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lease.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = rundir.read_json(path)
        if held is not None and not _yields(run_dir, held, incarnation, job_runs):
            return held
        rundir.write_json(path, _own(incarnation))
    return None


def is_held(run_dir: Path, incarnation: Incarnation) -> bool:
    """Whether the lease is still that of ``incarnation``; a file that cannot be read now is taken for unchanged."""
    with contextlib.suppress(OSError):
        held = rundir.read_json(rundir.lease_file(run_dir))
        return held is None or held.get("incarnation") == str(incarnation)
    return True


def _yields(
    run_dir: Path, held: dict[str, Any], incarnation: Incarnation, job_runs: Callable[[str], bool | None]
) -> bool:
    """Whether the holder is an earlier incarnation of the same job, or gone."""
    other = Incarnation.parse(held["incarnation"])
    local = other.job.startswith("local-")
    if other.job == incarnation.job and (not local or _who(held) == _who(_own(incarnation))):
        return (other.restart, other.attempt) <= (incarnation.restart, incarnation.attempt)
    if not local:
        runs = job_runs(other.job)
        if runs is not None:
            return not runs
    elif held["host"] == socket.gethostname():
        return start_tick(held["pid"]) != held["start_tick"]
    return _silent_for(run_dir, held) > _SILENT


def _own(incarnation: Incarnation) -> dict[str, Any]:
    return {
        "incarnation": str(incarnation),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start_tick": start_tick(os.getpid()),
        "time": round(time.time(), 3),
    }


def _who(lease: dict[str, Any]) -> tuple[Any, ...]:
    return lease["host"], lease["pid"], lease["start_tick"]


def _silent_for(run_dir: Path, held: dict[str, Any]) -> float:
    """Seconds since the last heartbeat of the holder, or since it took the lease: its ranks need a while until they beat."""
    beats = rundir.live_dir(run_dir, held["incarnation"]).glob("rank-*.json")
    return time.time() - max([held["time"], *(path.stat().st_mtime for path in beats)])
