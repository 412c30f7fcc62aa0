"""``megamem launch status | logs | cancel | requeue | history``: looking after what was launched."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megamem.config import at_least
from megamem.errors import LaunchError
from megamem.observe.progress import format_count, format_duration
from megamem_launch.slurm.control import cancel, goes_on, requeue
from megamem_launch.slurm.history import Record, read_history, with_accounting
from megamem_launch.slurm.launched import find_launched, sweep_points
from megamem_launch.slurm.logs import Log, find_logs, follow, job_logs
from megamem_launch.slurm.reasons import clock
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.slurm.status import Status, read_status, read_sweep_status
from megamem_launch.verbs.launch_jobs_arguments import (
    CancelArguments,
    HistoryArguments,
    LogsArguments,
    RequeueArguments,
    StatusArguments,
)
from megamem_launch.verbs.parse import parse

_STYLES = {
    "running": "green",
    "finished": "green",
    "failed": "red",
    "unknown": "red",
    "cancelled": "yellow",
    "stopped": "yellow",
}


def main(action: str, argv: list[str]) -> int:
    """Entry of ``megamem launch ACTION``; ``action`` is one of those that this module's first line names."""
    actions: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
        "status": (StatusArguments, _status),
        "logs": (LogsArguments, _logs),
        "cancel": (CancelArguments, _cancel),
        "requeue": (RequeueArguments, _requeue),
        "history": (HistoryArguments, _history),
    }
    arguments, act = actions[action]
    return act(parse(arguments, argv, f"launch {action}"))


def _status(arguments: StatusArguments) -> int:
    run_dir = find_launched(arguments.run, Path(arguments.runs_dir))
    points = sweep_points(run_dir)
    if points:
        statuses = read_sweep_status(run_dir, points, Slurm())
        if arguments.json:
            print(json.dumps({"run_dir": str(run_dir), "points": [asdict(status) for status in statuses]}, indent=1))
        else:
            _print_sweep(run_dir, statuses)
        return int(any(status.state == "unknown" for status in statuses))
    status = read_status(run_dir, Slurm())
    if arguments.json:
        print(json.dumps(asdict(status), indent=1))
    else:
        _print_status(status)
    return int(status.state == "unknown")


def _print_status(status: Status) -> None:
    console = _console()
    title = Text(Path(status.run_dir).resolve().name, "bold")
    console.print(title, Text(status.state, _STYLES.get(status.state, "bold")), Text(_doing(status)))
    if status.why:
        console.print(f"  {status.why}", markup=False, soft_wrap=True)
    rows: list[tuple[str, str]] = []
    if status.nodes:
        ranks = f"  ({status.ranks} ranks{_silence(status)})" if status.ranks else ""
        rows.append(("nodes", " ".join(status.nodes) + ranks))
    if status.incarnation:
        requeued = f", its jobs requeued {status.requeues} times" if status.requeues else ""
        rows.append(("incarnation", f"{status.incarnation}, number {status.incarnations} of this run{requeued}"))
    rows += [("excluded", f"{node}: {why}") for node, why in status.excluded.items()]
    for job in status.jobs:
        details = " ".join(text for text in (job.kind, job.state, job.nodes) if text)
        rows.append((f"job {job.id}", f"{details}: {job.why}" if job.why else details))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    console.print(table)


def _console() -> Console:
    """As wide as the terminal; a file or a pipe gets lines that do not wrap so soon."""
    return Console(highlight=False, width=shutil.get_terminal_size((160, 24)).columns)


def _doing(status: Status) -> str:
    """How far a run is and how fast."""
    parts = []
    if status.total_steps is not None or status.step:
        of = f" of {status.total_steps}" if status.total_steps is not None else ""
        parts.append(f"at step {status.step}{of}")
    if status.tokens_per_second is not None:
        parts.append(f"{format_count(status.tokens_per_second)} tokens/s")
    if status.step_seconds is not None:
        parts.append(f"{status.step_seconds:.3g} s per step")
    if status.eta_seconds is not None:
        parts.append(f"done in {format_duration(status.eta_seconds)}, at {clock(time.time() + status.eta_seconds)}")
    return " · ".join(parts)


def _silence(status: Status) -> str:
    if status.heartbeat_age is None or status.heartbeat_age < 10:
        return ""
    return f", one of which has been silent for {format_duration(status.heartbeat_age)}"


def _print_sweep(run_dir: Path, statuses: list[Status]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, title=run_dir.name, title_justify="left")
    for name in ("point", "state", "step", "tokens/s"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("point", "state") else "right")
    table.add_column("", overflow="fold")
    for status in statuses:
        step = f"{status.step}/{status.total_steps}" if status.total_steps is not None else str(status.step)
        speed = format_count(status.tokens_per_second) if status.tokens_per_second is not None else ""
        state = Text(status.state, _STYLES.get(status.state, ""))
        table.add_row(Text(Path(status.run_dir).name), state, step, speed, Text(status.why))
    _console().print(table)


def _logs(arguments: LogsArguments) -> int:
    at_least(arguments, 0, "lines")
    if arguments.job and (arguments.rank is not None or arguments.incarnation):
        raise LaunchError(
            "--job shows what batch scripts wrote, which has no ranks or incarnations; leave out one of the options"
        )
    run_dir = _one_run(arguments.run, Path(arguments.runs_dir))

    def find() -> list[Log]:
        return job_logs(run_dir) if arguments.job else find_logs(run_dir, arguments.incarnation, arguments.rank)

    def show(log: Log, line: str) -> None:
        print(f"{log.source} | {line}", flush=arguments.follow)

    if not arguments.follow:
        shown = [(log, line) for log in find() for line in log.tail(arguments.lines)]
        for log, line in shown:
            show(log, line)
        if not shown:
            who = "nothing" if arguments.rank is None else f"nothing by rank {arguments.rank}"
            print(f"{run_dir}: {who} was written yet", file=sys.stderr)
        return 0
    try:
        for log, line in follow(run_dir, find, arguments.lines):
            show(log, line)
    except KeyboardInterrupt:  # how a reader stops reading
        print()
    return 0


def _cancel(arguments: CancelArguments) -> int:
    at_least(arguments, 0, "timeout")
    run_dir = find_launched(arguments.run, Path(arguments.runs_dir))
    points = sweep_points(run_dir)
    ended = cancel([run_dir, *points], Slurm(), arguments.timeout)
    if arguments.json:
        print(json.dumps({"run_dir": str(run_dir), "ended": ended}))
    elif not ended:
        print(f"{run_dir} was cancelled already")
    else:
        then = "" if points else f"; a new `megamem launch` {goes_on(run_dir)}"
        print(f"{run_dir}: ended {', '.join(ended)}{then}")
    return 0


def _requeue(arguments: RequeueArguments) -> int:
    run_dir = _one_run(arguments.run, Path(arguments.runs_dir))
    done = requeue(run_dir, Slurm(), now=arguments.now)
    print(json.dumps({"run_dir": str(run_dir), "done": done}) if arguments.json else f"{run_dir}: {done}")
    return 0


def _history(arguments: HistoryArguments) -> int:
    run_dir = _one_run(arguments.run, Path(arguments.runs_dir))
    records = with_accounting(read_history(run_dir))
    if arguments.json:
        print(json.dumps({"run_dir": str(run_dir), "incarnations": [asdict(record) for record in records]}, indent=1))
        return 0
    if not records:
        print(f"{run_dir}: no supervisor has started yet; see `megamem launch status`")
        return 0
    accounted = any(record.elapsed_seconds is not None for record in records)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("incarnation", "start", "time", "steps", *(["elapsed", "max RSS"] if accounted else [])):
        table.add_column(name, no_wrap=True, justify="left" if name in ("incarnation", "start") else "right")
    table.add_column("nodes", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    table.add_column("", overflow="fold", ratio=1)
    for record in records:
        table.add_row(*map(Text, _cells(record, accounted)))
    _console().print(table)
    return 0


def _cells(record: Record, accounted: bool) -> list[str]:
    steps = f"{record.first_step} to {'...' if record.last_step is None else record.last_step}"
    lasted = format_duration(record.ended - record.started) if record.ended is not None else ""
    cells = [record.incarnation, clock(record.started), lasted, steps]
    if accounted:
        cells.append(format_duration(record.elapsed_seconds) if record.elapsed_seconds is not None else "")
        cells.append(f"{record.max_rss_mib:.0f} MiB" if record.max_rss_mib is not None else "")
    cells += [" ".join(record.nodes), record.outcome or "(runs)"]
    return [*cells, "; ".join(text for text in (record.reason, record.stragglers) if text)]


def _one_run(run: str, runs_dir: Path) -> Path:
    """The directory of a run that is no sweep."""
    run_dir = find_launched(run, runs_dir)
    points = sweep_points(run_dir)
    if points:
        raise LaunchError(f"{run_dir} is a sweep; name one of its points, such as {points[0]}")
    return run_dir
