"""What a signal to a job means: SLURM sends the same ones for a time limit, a preemption and a cancellation."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import Literal

from megamem_launch import rundir
from megamem_launch.slurm.parse import Job
from megamem_launch.supervise.submission import Submission

_EARLY = 90.0  # seconds that SLURM sends the signal before a time limit earlier than it was asked to


@dataclass(frozen=True, slots=True)
class Request:
    """A reason for the ranks to end."""

    asked: Literal["time_limit", "preempted", "cancelled", "stopped"]
    why: str
    final: bool = False
    """The ranks are to end at once, without saving."""


def request_of(
    number: signal.Signals | None,
    job: Job | None,
    submission: Submission,
    *,
    local: bool,
    again: bool,
    ends: float | None = None,
) -> Request | None:
    """The request that a signal makes of a run whose job SLURM describes as ``job`` (None: it does not answer, or ``local``, there
    is no job); ``again``: one was made before; ``ends``, when the job's time was over, by its last answer [s since 1970]. None
    where the signal changes nothing.

    ``number`` is None for a SIGTERM that the ranks got and this process did not: srun sends one to ranks that outlive another, so
    only SLURM's own word makes it a request.

    A job that is requeued, out of time or preempted without notice still has KillWait, 30 s by default, to save in.
    """
    run_dir, slurm = submission.run_dir, submission.cluster.slurm
    if rundir.cancelled_file(run_dir).exists() or (job is not None and job.state == "CANCELLED"):
        return Request("cancelled", "cancelled by a person", final=True)
    if number is None and (job is None or (job.state == "RUNNING" and job.preempted is None)):
        return None
    name = number.name if number is not None else "SIGTERM"
    if local:
        return Request("stopped", f"interrupted by {name}{', again' if again else ''}", final=again)
    if again:
        return None
    ends = job.ends if job is not None else ends
    near = ends is not None and ends - time.time() < slurm.signal_seconds + _EARLY
    if job is None and number != signal.SIGTERM and near:
        return Request("time_limit", "the time limit is near")
    if job is None:
        return Request("preempted", f"SLURM sent {name} and does not say why")
    if job.state == "TIMEOUT":
        return Request("time_limit", "the time limit was reached")
    if job.preempted is not None:
        return Request("preempted", "preempted by another job")
    if job.state != "RUNNING":
        return Request("preempted", f"SLURM ends the job, which it calls {job.state}")
    if number != signal.SIGTERM and near:
        return Request("time_limit", "the time limit is near")
    if number == signal.SIGTERM:
        return Request("preempted", f"asked to make room by {name}")
    # SLURM itself sends the job's own signal for the two reasons above alone.
    return Request("preempted", f"asked by a person to make room ({name}, as `megamem launch requeue` sends it)")
