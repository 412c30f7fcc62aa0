"""Ending and requeueing the jobs of a run."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamem.errors import LaunchError
from megamem_launch import rundir
from megamem_launch.cluster import load_cluster
from megamem_launch.slurm.history import read_history
from megamem_launch.slurm.judgement import is_of
from megamem_launch.slurm.parse import Job
from megamem_launch.slurm.reasons import why_waiting
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.slurm.status import local_supervisor
from megamem_launch.slurm.submit import SCRIPT, record_job, submit
from megamem_launch.supervise.budget import checkpoint_step
from megamem_launch.watch.beats import read_beats

_POLL_SECONDS = 0.5
_AGAIN_SECONDS = 5.0
_HELD = ("JobHeldUser", "JobHoldMaxRequeue", "MaxRequeueExceeded", "launch_failed_requeued_held")
"""Reasons for which a job waits until its user releases it."""


def cancel(run_dirs: Sequence[Path], slurm: Slurm, timeout: float) -> list[str]:
    """End runs for good and wait until nothing of them is left; the jobs and supervisors that were ended, none where they were
    cancelled already.

    A run is marked as cancelled before its jobs are, so that nobody who sees one of them end starts it again.

    Raises:
        LaunchError: nothing of the runs lives; or, after the marking, jobs could not be cancelled or still lived after
            ``timeout`` seconds. The same call then goes on.
    """
    jobs, supervisors = _living(run_dirs, slurm)
    if not jobs and not supervisors and rundir.cancelled_file(run_dirs[0]).exists():
        return []
    if not jobs and not supervisors:
        raise LaunchError(
            f"{run_dirs[0]} has no job and no supervisor that could be cancelled; see `megamem launch status`"
        )
    mark = {"time": round(time.time(), 3), "user": getpass.getuser(), "host": socket.gethostname()}
    for run_dir in run_dirs:
        if not rundir.finished_file(run_dir).exists():  # what waits of a finished run is ended without a word
            rundir.write_json(rundir.cancelled_file(run_dir), mark)
    ended, asked, deadline = _names(jobs, supervisors), -_AGAIN_SECONDS, time.monotonic() + timeout
    while jobs or supervisors:
        if (now := time.monotonic()) > deadline:
            left = ", ".join(_names(jobs, supervisors))
            raise LaunchError(
                f"cancelled, but {left} still lives after {timeout:.0f} s; see `megamem launch status {run_dirs[0]}`"
            )
        if now - asked > _AGAIN_SECONDS:  # again, since one that was just being requeued may have come back
            asked = now
            slurm.cancel(sorted({job.id for job in jobs}))
            for pid in supervisors:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
        jobs, supervisors = _living(run_dirs, slurm)
    return ended


def requeue(run_dir: Path, slurm: Slurm, *, now: bool) -> str:
    """Let a run stop where it is and begin again from there, or start one again that ended; what was done, in a sentence.

    A job that trains saves first, unless ``now`` is set: then it loses what it did since its last checkpoint.

    Raises:
        LaunchError: the run has finished, was cancelled, or waits already; or SLURM refuses. Nothing is then submitted.
    """
    finished = rundir.read_json(rundir.finished_file(run_dir))
    if finished is not None:
        raise LaunchError(
            f"{run_dir} has trained all its {finished.get('step', '')} steps, nothing is left to requeue; to train on, submit it "
            f"with more: `megamem launch slurm {run_dir} train.steps=... --cluster FILE`"
        )
    if rundir.cancelled_file(run_dir).exists():
        raise LaunchError(
            f"{run_dir} was cancelled, which is final for its jobs; submit it anew to go on: "
            f"`megamem launch slurm {run_dir} --cluster FILE`"
        )
    if any(line.get("kind") == "data" for line in rundir.read_lines(rundir.jobs_file(run_dir))):
        raise LaunchError(f"{run_dir} prepares data, which begins anew: cancel it and give `megamem launch data` again")
    if not job_ids(run_dir):
        raise LaunchError(f"{run_dir} has no job of SLURM; start it again with `megamem launch local {run_dir}`")
    living, _ = _living([run_dir], slurm)
    running = next((job for job in living if not job.waiting), None)
    wishes = [rundir.stopped_file(run_dir)]
    if running is None:  # what trains obeys it
        wishes.append(run_dir / rundir.STOP)
    with _withdrawn(*wishes):
        if running is not None:
            return _requeue_running(run_dir, running, slurm, now=now)
        if living:
            return _release(run_dir, living[0], slurm)
        return _submit_again(run_dir)


@contextlib.contextmanager
def _withdrawn(*wishes: Path) -> Iterator[None]:
    """Without files that keep a run from starting; they are back where what was done instead fails."""
    before = {path: path.read_bytes() for path in wishes if path.exists()}
    for path in before:
        path.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        for path, content in before.items():
            path.write_bytes(content)
        raise


def goes_on(run_dir: Path) -> str:
    """Where the next start of a run begins, for the end of a sentence."""
    step = checkpoint_step(run_dir)
    return f"goes on from its checkpoint of step {step}" if step else "begins anew, as it has no checkpoint"


def job_ids(run_dir: Path) -> list[str]:
    """The jobs that were submitted for a run, in order."""
    return [str(line["job_id"]) for line in rundir.read_lines(rundir.jobs_file(run_dir)) if "job_id" in line]


def _requeue_running(run_dir: Path, job: Job, slurm: Slurm, *, now: bool) -> str:
    if job.state == "COMPLETING":
        raise LaunchError(f"job {job.id} of {run_dir} is being cleared from its nodes; try again in a moment")
    settings = load_cluster(_last_submission(run_dir) / "cluster.yaml").slurm
    if not settings.requeue:
        raise LaunchError(
            f"job {job.id} of {run_dir} was submitted with slurm.requeue=false, so SLURM does not requeue it; cancel it and submit "
            "it with slurm.requeue=true"
        )
    if now:
        slurm.requeue(job.id)
        return f"job {job.id} is stopped and requeued; it {goes_on(run_dir)}"
    history = read_history(run_dir)
    if not history or not is_of(history[-1], job) or not read_beats(rundir.live_dir(run_dir, history[-1].incarnation)):
        raise LaunchError(
            f"job {job.id} of {run_dir} has not begun to train, so there is nothing to save; try again when "
            "`megamem launch status` says that it runs, or requeue it at once with --now"
        )
    slurm.signal(job.id, settings.signal, batch=True)
    return f"job {job.id} was asked to save; it then goes back into the queue"


def _release(run_dir: Path, job: Job, slurm: Slurm) -> str:
    if job.reason.replace(" ", "_") not in _HELD:
        raise LaunchError(f"job {job.id} of {run_dir} waits in the queue already: {why_waiting(job)}")
    slurm.release(job.id)
    return f"job {job.id} was held and waits for its nodes now"


def _submit_again(run_dir: Path) -> str:
    lines = [line for line in rundir.read_lines(rundir.jobs_file(run_dir)) if "job_id" in line]
    last, folder = lines[-1], _last_submission(run_dir)
    script, options = folder / SCRIPT, list[str]()
    if last.get("kind") == "sweep":  # one script for all points; each knows its number by the job it had
        parents = rundir.read_lines(rundir.jobs_file(run_dir.parent))
        array, _, task = str(last["job_id"]).rpartition("_")
        name = next((str(line["submission"]) for line in parents if str(line.get("job_id")) == array), "")
        script, options = rundir.launch_dir(run_dir.parent) / name / SCRIPT, [f"--array={task}"]
    if not script.is_file():
        raise LaunchError(
            f"{script}, the script of the last submission of {run_dir}, is gone; submit with `megamem launch slurm`"
        )

    def own(job: str) -> str:
        return f"{job}_{task}" if options else job

    def record(job: str, _: str) -> None:
        record_job(run_dir, own(job), folder, last.get("kind", "run"), str(last.get("name", "")))
        if options:
            record_job(run_dir.parent, own(job), script.parent, "sweep", str(last.get("name", "")))

    (job,) = submit([script], load_cluster(folder / "cluster.yaml"), record, options=options)
    return f"job {own(job)} was submitted; it {goes_on(run_dir)}"


def _last_submission(run_dir: Path) -> Path:
    """Directory of the submission that the last job of a run belongs to."""
    names = [str(line["submission"]) for line in rundir.read_lines(rundir.jobs_file(run_dir)) if "submission" in line]
    folder = rundir.launch_dir(run_dir) / (names[-1] if names else "")
    if not names or not folder.is_dir():
        raise LaunchError(
            f"{folder}, which the last job of {run_dir} belongs to, is gone; submit with `megamem launch slurm`"
        )
    return folder


def _living(run_dirs: Sequence[Path], slurm: Slurm) -> tuple[list[Job], list[int]]:
    """What waits or runs of some runs: jobs, and processes on this machine that supervise without SLURM."""
    ids = dict.fromkeys(job for run_dir in run_dirs for job in job_ids(run_dir))
    jobs = [job for job in slurm.jobs(list(ids)) if not job.over]
    return jobs, [pid for run_dir in run_dirs if (pid := _local_pid(run_dir)) is not None]


def _names(jobs: Sequence[Job], supervisors: Sequence[int]) -> list[str]:
    return [*dict.fromkeys(f"job {job.id}" for job in jobs), *(f"supervisor {pid}" for pid in supervisors)]


def _local_pid(run_dir: Path) -> int | None:
    """The process that supervises a run on this machine without SLURM; LaunchError where it is another machine's."""
    history = read_history(run_dir)
    if not history or not history[-1].job.startswith("local-") or history[-1].outcome:
        return None
    found = local_supervisor(run_dir, list(read_beats(rundir.live_dir(run_dir, history[-1].incarnation)).values()))
    if found is None:
        return None
    host, pid = found
    if host != socket.gethostname():
        raise LaunchError(f"{run_dir} is supervised by process {pid} of {host}; cancel it there")
    return pid
