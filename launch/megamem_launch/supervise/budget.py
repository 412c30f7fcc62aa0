"""How often a run is started again: only starts without progress count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamem_checkpoints.directory import is_whole, steps
from megamem_launch import rundir

_NOT_ITS_FAULT = {"finished", "stopped", "preempted", "cancelled", "superseded"}


def checkpoint_step(run_dir: Path) -> int:
    """The step of the newest whole checkpoint of a run; 0 without one."""
    for path in reversed(steps(run_dir / "checkpoints")):
        if is_whole(path):
            return int(path.name.removeprefix("step_"))
    return 0


def fruitless_starts(run_dir: Path, job: str, step: int) -> int:
    """How many of the run's last starts in a row ended without a newer checkpoint than they began with.

    Those count that belong to ``job`` or to a job of its chain: what a person submits anew has its whole budget. One that ended
    because a person or another job wanted it is no failure and is left out. ``step`` is the newest checkpoint now: what a start
    that left no end, as when the host of the supervisor lost power, had come to.
    """
    records = rundir.read_lines(rundir.incarnations_file(run_dir))
    members = chain_of(run_dir, job)
    starts = [r for r in records if r.get("event") == "start"]
    ends = {r["incarnation"]: r for r in records if r.get("event") == "end"}
    count = 0
    for index, start in enumerate(starts):
        if start["job_id"] not in members:
            continue
        after = starts[index + 1]["step"] if index + 1 < len(starts) else step
        end: dict[str, Any] = ends.get(start["incarnation"], {"outcome": "lost", "step": after})
        if max(end["step"], after) > start["step"]:  # ranks may save after the end was written
            count = 0
        elif end["outcome"] not in _NOT_ITS_FAULT:
            count += 1
    return count


def chain_of(run_dir: Path, job: str) -> set[str]:
    """The ids of the jobs that were submitted together with ``job``, one after the other, itself among them."""
    after = {str(line["job_id"]): str(line.get("after") or "") for line in rundir.read_lines(rundir.jobs_file(run_dir))}

    def first(member: str) -> str:
        while before := after.get(member):
            member = before
        return member

    return {job} | {member for member in after if first(member) == first(job)}


def is_followed(run_dir: Path, job: str) -> bool:
    """Whether a later job of a chain begins when ``job`` ends."""
    return any(str(line.get("after")) == job for line in rundir.read_lines(rundir.jobs_file(run_dir)))
