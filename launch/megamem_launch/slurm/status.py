"""What a run does now: from the files of the run, and from SLURM, which is asked anew each time."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamem.errors import LaunchError
from megamem.observe.heartbeat import start_tick
from megamem_launch import rundir
from megamem_launch.slurm.history import Record, accounted_state, read_history
from megamem_launch.slurm.judgement import ACTIVE, Known, State, is_of, judge, running_job
from megamem_launch.slurm.parse import Job
from megamem_launch.slurm.progress import Progress, read_progress
from megamem_launch.slurm.reasons import why_ended, why_waiting
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.watch.beats import ENDED, Beat, read_beats

_SILENT = 60.0  # seconds without a heartbeat after which a run on a machine that cannot be asked counts as ended


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """One submitted job of a run."""

    id: str
    kind: str
    """run, chain, sweep or data."""
    submission: str
    state: str
    """SLURM's word; FORGOTTEN once the controller does not know the job any more, UNKNOWN where it does not answer."""
    why: str
    """Why it waits or how it ended, in plain words; empty while it runs."""
    nodes: str
    restarts: int | None


@dataclass(frozen=True, kw_only=True)
class Status:
    """One answer of ``megamem launch status``. Times are in seconds."""

    run_dir: str
    state: State
    why: str = ""
    """The reason in one sentence; empty where the state says it all."""
    step: int = 0
    """Steps done."""
    total_steps: int | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    eta_seconds: float | None = None
    incarnation: str = ""
    nodes: list[str] = field(default_factory=list)
    ranks: int = 0
    """Ranks that have written a heartbeat."""
    heartbeat_age: float | None = None
    """Since the newest heartbeat of the rank that is silent longest."""
    incarnations: int = 0
    requeues: int = 0
    """How often SLURM started jobs of the run anew."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Nodes that the run avoids, and why."""
    jobs: list[JobStatus] = field(default_factory=list)


def read_status(run_dir: Path, slurm: Slurm, jobs: Sequence[Job] | None = None, failure: str = "") -> Status:
    """What the run in ``run_dir`` does now. SLURM is asked only about runs that have jobs, and not for ``jobs`` that are given, or
    where ``failure`` says why it does not answer.

    Where SLURM does not answer, and no mark in the run says how it ended, the state is ``unknown`` and ``why`` says so, with what
    the files of the run tell beside it.
    """
    lines = [line for line in rundir.read_lines(rundir.jobs_file(run_dir)) if "job_id" in line]
    ids = [str(line["job_id"]) for line in lines]
    try:
        known_jobs = slurm.jobs(ids) if jobs is None else jobs
        jobs = [_with_exit_code(job, slurm) for job in known_jobs if _submitted_as(job, ids)]
    except LaunchError as error:
        failure, jobs = str(error), []
    jobs.sort(key=lambda job: ids.index(_submitted_as(job, ids)))
    history = read_history(run_dir)
    last = history[-1] if history else None
    data = any(line.get("kind") == "data" for line in lines)
    latest = [str(line["job_id"]) for line in lines if line.get("submission") == lines[-1].get("submission")]
    beats = list(read_beats(rundir.live_dir(run_dir, last.incarnation)).values()) if last else []
    known = Known(
        finished=_has_finished(run_dir, data),
        cancelled=rundir.cancelled_file(run_dir).exists(),
        jobs=[job for job in jobs if not data or _submitted_as(job, latest)],
        last=last,
        local=last is not None and last.job.startswith("local-") and local_supervisor(run_dir, beats) is not None,
        training=any(beat.step > 0 for beat in beats),
        supervised=not data,
    )
    state, why = (_marked(run_dir, known) or ("unknown", failure)) if failure else judge(known)
    if state == "failed" and last is None and not jobs and (word := accounted_state(ids[-1])):
        why += f"; SLURM's accounts call it {word}"
    stop = rundir.stop_lies(run_dir)
    if stop and state == "failed" and last is None and all(job.state == "COMPLETED" for job in jobs):
        state, why = "stopped", stop  # its supervisor ended at once
    elif stop and state in ("pending", "stopped", "failed"):
        why = "; ".join(text for text in (why, stop) if text)
    progress = read_progress(run_dir)
    if state != "running":
        progress = Progress(step=progress.step, total_steps=progress.total_steps)
    return Status(
        run_dir=str(run_dir),
        state=state,
        why=why,
        **asdict(progress),
        incarnation=last.incarnation if last else "",
        nodes=_nodes(known, slurm) if state in ACTIVE else [],
        ranks=len(beats) if state in ACTIVE else 0,
        heartbeat_age=_age(beats) if state == "running" else None,
        incarnations=len(history),
        requeues=_requeues(history, jobs),
        excluded=_excluded(run_dir),
        jobs=[_job_status(line, jobs, answered=not failure) for line in lines],
    )


def read_sweep_status(sweep_dir: Path, points: Sequence[Path], slurm: Slurm) -> list[Status]:
    """What the points of a sweep do now, with one question to SLURM for all."""
    lines = rundir.read_lines(rundir.jobs_file(sweep_dir))
    try:
        jobs = slurm.jobs([str(line["job_id"]) for line in lines if "job_id" in line])
    except LaunchError as error:
        return [read_status(point, slurm, [], str(error)) for point in points]
    return [read_status(point, slurm, jobs) for point in points]


def _marked(run_dir: Path, known: Known) -> tuple[State, str] | None:
    """How a run ended by the marks in its directory, while SLURM cannot be asked; None where there is no mark."""
    if known.local:
        return judge(known)
    if known.cancelled:
        return "cancelled", "SLURM does not say whether all its jobs are gone"
    if known.finished:
        return "finished", ""
    stopped = rundir.read_json(rundir.stopped_file(run_dir))
    if stopped is None:
        return None
    return "failed" if stopped.get("exit_code") else "stopped", str(stopped.get("reason", ""))


def _with_exit_code(job: Job, slurm: Slurm) -> Job:
    """A job that squeue calls JobLaunchFailure, which a script that was killed is too, with the code that tells them apart."""
    if job.state != "FAILED" or job.reason != "JobLaunchFailure" or job.exit_code:
        return job
    return slurm.job(job.id) or job


def _has_finished(run_dir: Path, data: bool) -> bool:
    """Whether a run is marked as finished, or the data is there that jobs in ``PATH.parts`` prepare."""
    if data:
        return (run_dir.with_name(run_dir.name.removesuffix(".parts")) / "data.json").is_file()
    return rundir.finished_file(run_dir).exists()


def local_supervisor(run_dir: Path, beats: Sequence[Beat]) -> tuple[str, int] | None:
    """Host and process of the supervisor that holds the run without SLURM; None where it has ended.

    On another machine, which cannot be asked, heartbeats tell.
    """
    lease = rundir.read_json(rundir.lease_file(run_dir)) or {}
    try:
        host, pid, tick = str(lease["host"]), int(lease["pid"]), int(lease["start_tick"])
    except (KeyError, TypeError, ValueError):
        return None
    if host == socket.gethostname():
        return (host, pid) if start_tick(pid) == tick else None
    fresh = any(time.time() - beat.time < _SILENT and beat.phase != ENDED for beat in beats)
    return (host, pid) if fresh else None


def _nodes(known: Known, slurm: Slurm) -> list[str]:
    current = running_job(known.jobs)
    if known.last is not None and (current is None or is_of(known.last, current)):
        return known.last.nodes
    return slurm.hostnames(current.nodes) if current is not None else []


def _submitted_as(job: Job, ids: Sequence[str]) -> str:
    """Which of ``ids`` a job is: its own, or that of its array; empty for none."""
    return next((name for name in (job.id, job.number, job.array) if name in ids), "")


def _job_status(line: dict[str, Any], jobs: Sequence[Job], *, answered: bool) -> JobStatus:
    id_ = str(line["job_id"])
    own = [job for job in jobs if _submitted_as(job, [id_])]
    job = next((job for job in own if not job.over), own[-1] if own else None)  # of an array the first task that lives
    why = ""
    if job is not None and job.waiting:
        why = why_waiting(job)
    elif job is not None and job.over and job.state != "COMPLETED":
        why = why_ended(job)
    return JobStatus(
        id=id_,
        kind=str(line.get("kind", "")),
        submission=str(line.get("submission", "")),
        state=job.state if job else "FORGOTTEN" if answered else "UNKNOWN",
        why=why,
        nodes=job.nodes if job else "",
        restarts=job.restarts if job else None,
    )


def _requeues(history: Sequence[Record], jobs: Sequence[Job]) -> int:
    """Restarts of all jobs: those that SLURM has forgotten left records, one that is requeued has none of its next start yet."""
    restarts: dict[str, int] = {}
    for job, count in [*((one.job, one.restart) for one in history), *((job.number, job.restarts) for job in jobs)]:
        restarts[job] = max(count, restarts.get(job, 0))
    return sum(restarts.values())


def _excluded(run_dir: Path) -> dict[str, str]:
    entries = rundir.read_json(rundir.excluded_file(run_dir)) or {}
    return {node: str(entry.get("reason", "")) for node, entry in entries.items() if isinstance(entry, dict)}


def _age(beats: Sequence[Beat]) -> float | None:
    ages = [time.time() - beat.time for beat in beats if beat.phase != ENDED]
    return round(max(0.0, max(ages)), 1) if ages else None
