"""In which state a run is, judged from what its files and SLURM say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megamem_launch.slurm.history import Record
from megamem_launch.slurm.parse import Job
from megamem_launch.slurm.reasons import not_opened, why_ended, why_waiting

State = Literal["pending", "starting", "running", "ending", "finished", "stopped", "cancelled", "failed", "unknown"]

ACTIVE: frozenset[State] = frozenset({"starting", "running", "ending"})
"""States in which a run has nodes."""

_STOPPED = {"stopped", "time_limit", "preempted", "superseded"}
"""Outcomes after which a run that nobody starts again is whole, only not finished."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What :func:`judge` decides from."""

    finished: bool
    cancelled: bool
    jobs: Sequence[Job]
    """Those that SLURM knows, in the order of submission."""
    last: Record | None
    """The last incarnation."""
    local: bool
    """Whether a supervisor of this run lives without SLURM."""
    training: bool
    """Whether the ranks of the last incarnation have taken up training."""
    supervised: bool
    """False for jobs that prepare data, which have no supervisor."""


def judge(known: Known) -> tuple[State, str]:
    """The state of a run and why, from what is known. Living jobs come first: a person may have begun a run again."""
    last = known.last
    current = running_job(known.jobs)
    waiting = next((job for job in known.jobs if job.waiting), None)
    alive = current is not None or waiting is not None or known.local
    if known.cancelled:
        return ("ending", "it was cancelled and its jobs are being ended") if alive else ("cancelled", "")
    if current is not None and current.state == "COMPLETING":
        return "ending", f"job {current.id} is being cleared from its nodes"
    if not known.supervised:
        return _without_supervisor(known)
    if current is not None and not (last is not None and is_of(last, current)):
        return "starting", f"job {current.id} has its nodes, its supervisor prepares them"
    if current is not None or known.local:
        assert last is not None
        if last.outcome:
            return (
                "starting",
                f"incarnation {last.incarnation} ended ({last.outcome}: {last.reason}), the next is prepared",
            )
        return ("running", "") if known.training else ("starting", "its ranks load the model and meet each other")
    if known.finished:
        return "finished", ""
    if waiting is not None:
        return "pending", f"job {waiting.id}: {why_waiting(waiting)}"
    return _ended(last, known.jobs)


def running_job(jobs: Sequence[Job]) -> Job | None:
    """The first of some jobs that has its nodes."""
    return next((job for job in jobs if not job.over and not job.waiting), None)


def is_of(record: Record, job: Job) -> bool:
    """Whether an incarnation is one of this start of a job."""
    return record.job in (job.number, job.id) and record.restart == job.restarts


def _without_supervisor(known: Known) -> tuple[State, str]:
    jobs = known.jobs
    if running_job(jobs) is not None:
        return "running", ""
    if known.finished:
        return "finished", ""
    failed = next((job for job in jobs if job.over and job.state != "COMPLETED"), None)
    if failed is not None and failed.state == "CANCELLED":
        return "cancelled", f"job {failed.id} was cancelled by SLURM's own means"
    if failed is not None:
        return "failed", f"job {failed.id}: {_with_output(failed)}"
    waiting = next((job for job in jobs if job.waiting), None)
    if waiting is not None:
        return "pending", f"job {waiting.id}: {why_waiting(waiting)}"
    return "failed", f"its jobs have ended{'' if jobs else ', SLURM has forgotten them'}, and the data is not there"


def _ended(last: Record | None, jobs: Sequence[Job]) -> tuple[State, str]:
    """Nothing of the run lives, and it neither finished nor was cancelled through us."""
    final = jobs[-1] if jobs else None
    if (
        final is not None
        and final.state == "CANCELLED"
        and not (last is not None and last.outcome in ("stopped", "fatal"))
    ):
        return "cancelled", f"job {final.id} was cancelled by SLURM's own means"
    if last is None:
        if final is None:
            return "failed", "SLURM has forgotten it"
        started = "" if not_opened(final) else "its supervisor never started: "
        return "failed", f"job {final.id}: {started}{_with_output(final)}"
    if last.outcome == "finished":
        return "finished", ""
    if last.outcome == "cancelled":
        return "cancelled", last.reason
    if last.outcome in _STOPPED:
        return "stopped", last.reason
    if last.outcome:
        return "failed", f"{last.outcome}: {last.reason}"
    how = f" (job {final.id}: {why_ended(final)})" if final is not None and is_of(last, final) else ""
    return "failed", f"the supervisor of incarnation {last.incarnation} ended without a word{how}"


def _with_output(job: Job) -> str:
    """How a job ended, and where to read more, if there is more."""
    return why_ended(job) + ("" if not_opened(job) else "; `megamem launch logs` shows its output")
