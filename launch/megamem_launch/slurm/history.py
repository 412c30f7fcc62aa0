"""The incarnations of a run: what its supervisors wrote, and what SLURM's accounting adds where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamem.errors import LaunchError
from megamem_launch import rundir
from megamem_launch.slurm import parse
from megamem_launch.slurm.client import SchedulerUnavailable, run


@dataclass(frozen=True, kw_only=True)
class Record:
    """One incarnation. Times are seconds since the epoch."""

    incarnation: str
    job: str
    restart: int
    attempt: int
    nodes: list[str]
    started: float
    first_step: int
    """Step of the checkpoint that it went on from; 0 for a new start."""
    ended: float | None = None
    """None while it runs, and where its supervisor was lost."""
    last_step: int | None = None
    """Step of its newest checkpoint at the end."""
    outcome: str = ""
    """In one word; empty while it runs. ``lost`` where a later incarnation began and this one never wrote an end."""
    reason: str = ""
    bad_nodes: dict[str, str] | None = None
    stragglers: str = ""
    """Ranks and nodes that were slower than the others; empty for none."""
    elapsed_seconds: float | None = None
    """Of its job since the last requeue, by SLURM's accounting."""
    max_rss_mib: float | None = None
    """Largest resident memory of a task of its job since the last requeue, by SLURM's accounting."""


def read_history(run_dir: Path) -> list[Record]:
    """The incarnations of a run in the order of their starts; records that lack what they must have are left out."""
    records: dict[str, Record] = {}
    for line in rundir.read_lines(rundir.incarnations_file(run_dir)):
        name = str(line.get("incarnation", ""))
        try:
            if line.get("event") == "start":
                record = _start(name, line)
                records = {other: _lost(earlier) for other, earlier in records.items()} | {name: record}
            elif line.get("event") == "end" and name in records:
                records[name] = _end(records[name], line)
        except (KeyError, TypeError, ValueError):
            continue
    return list(records.values())


def with_accounting(records: Sequence[Record]) -> list[Record]:
    """``records`` with elapsed time and memory of their jobs; as they are where the cluster keeps no accounts."""
    jobs = list(dict.fromkeys(record.job for record in records if not record.job.startswith("local")))
    accounts = {job: lines for job in jobs if (lines := accounted(job))}
    filled = []
    for record in records:
        starts = accounts.get(record.job, [])
        if record.restart < len(starts):
            elapsed, rss = starts[record.restart]
            record = replace(record, elapsed_seconds=elapsed, max_rss_mib=rss)
        filled.append(record)
    return filled


def accounted(job: str) -> list[tuple[float | None, float | None]]:
    """For each start of a job, requeues included: elapsed seconds and the largest resident memory of a task [MiB].

    Empty where the cluster keeps no accounts, has no sacct or does not answer.
    """
    fields = ",".join(parse.SACCT_FIELDS)
    selection = ("sacct", "--noheader", "--parsable2", "--duplicates", f"--jobs={job}", f"--format={fields}")
    try:
        lines = parse.sacct_records(run(*selection))
    except LaunchError:
        return []
    starts: list[tuple[float | None, float | None]] = []
    for line in lines:
        if line["JobID"] == job:
            starts.append((float(line["ElapsedRaw"]) if line["ElapsedRaw"].isdigit() else None, None))
        elif starts and line["JobID"].startswith(f"{job}.") and (rss := parse.mebibytes(line["MaxRSS"])) is not None:
            elapsed, largest = starts[-1]
            starts[-1] = elapsed, max(rss, largest or 0.0)
    return starts


def accounted_state(job: str) -> str:
    """How a job that the controller has forgotten ended (COMPLETED, TIMEOUT, ...); empty where nobody knows."""
    fields = ",".join(parse.SACCT_FIELDS)
    try:
        lines = parse.sacct_records(run("sacct", "--noheader", "--parsable2", f"--jobs={job}", f"--format={fields}"))
    except SchedulerUnavailable:
        raise
    except LaunchError:
        return ""
    return next((line["State"] for line in reversed(lines) if line["JobID"] == job), "")


def _start(name: str, line: dict[str, Any]) -> Record:
    return Record(
        incarnation=name,
        job=str(line["job_id"]),
        restart=int(line["restart"]),
        attempt=int(line["attempt"]),
        nodes=[str(node) for node in line["nodes"]],
        started=float(line["time"]),
        first_step=int(line["step"]),
    )


def _end(record: Record, line: dict[str, Any]) -> Record:
    stragglers = line.get("stragglers") or {}
    return replace(
        record,
        ended=float(line["time"]),
        last_step=int(line["step"]),
        outcome=str(line["outcome"]),
        reason=str(line["reason"]),
        bad_nodes={str(node): str(why) for node, why in dict(line.get("bad_nodes") or {}).items()},
        stragglers=str(stragglers.get("text", "")) if isinstance(stragglers, dict) else str(stragglers),
    )


def _lost(record: Record) -> Record:
    if record.outcome:
        return record
    return replace(
        record, outcome="lost", reason="its supervisor ended without a word: its node was lost, or it was killed"
    )
