"""The output of a run's supervisors, ranks and jobs, each line with where it comes from."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megamem.errors import LaunchError
from megamem_launch import rundir
from megamem_launch.slurm.history import read_history

_RANK = re.compile(r"(?P<node>.+)-(?P<rank>\d+)\.log")
_BLOCK = 1 << 16
_POLL_SECONDS = 0.3


@dataclass
class Log:
    """One file that is read from its end on."""

    path: Path
    source: str
    """What stands before its lines: ``supervisor``, ``node1 rank 0``, ``job 17``."""
    rank: int = -1
    """-1 for a log that is no rank's."""
    _position: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def tail(self, lines: int) -> list[str]:
        """The last ``lines`` lines, a last one without its end included; reading goes on behind them."""
        try:
            with self.path.open("rb") as file:
                end = position = file.seek(0, os.SEEK_END)
                data = b""
                while position > 0 and data.count(b"\n") <= lines:
                    start = max(0, position - _BLOCK)
                    file.seek(start)
                    data = file.read(position - start) + data
                    position = start
        except OSError:
            return []
        self._position = end
        return [_text(line) for line in data.removesuffix(b"\n").split(b"\n")[-lines:]] if lines and data else []

    def more(self, *, rest: bool = False) -> list[str]:
        """Whole lines that were written since; with ``rest`` also a last one without its end."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except OSError:
            return []
        self._position += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if rest and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        return [_text(line) for line in whole]


def find_logs(run_dir: Path, incarnation: str = "", rank: int | None = None) -> list[Log]:
    """The logs of one incarnation (default: the last), its supervisor's first, then by rank; with ``rank`` that one alone.

    Where no supervisor has started yet, those of the jobs. LaunchError where there is none, which names what there is.
    """
    names = [record.incarnation for record in read_history(run_dir)]
    if incarnation and incarnation not in names:
        raise LaunchError(
            f"{run_dir} has no incarnation {incarnation}; it has {', '.join(names) or 'none yet'} (see `megamem launch history`)"
        )
    if not names:
        if rank is not None:
            raise LaunchError(f"no rank of {run_dir} has started yet; leave out --rank to see the output of its jobs")
        return job_logs(run_dir)
    chosen = incarnation or names[-1]
    logs = _of_incarnation(rundir.log_dir(run_dir, chosen))
    if rank is not None:
        ranks = [log.rank for log in logs if log.rank >= 0]
        logs = [log for log in logs if log.rank == rank]
        if not logs:
            there = f"there are {min(ranks)} to {max(ranks)}" if ranks else "no rank has written yet"
            raise LaunchError(f"incarnation {chosen} has no log of rank {rank}; {there}")
    return logs


def job_logs(run_dir: Path) -> list[Log]:
    """What the batch scripts of a run printed, in the order of submission: the supervisor's words, and rank 0's.

    That of a point of a sweep lies with the sweep. LaunchError where there is nothing.
    """
    logs = []
    for line in rundir.read_lines(rundir.jobs_file(run_dir)):
        job = str(line.get("job_id"))
        for directory in (run_dir, run_dir.parent):
            tasks = (rundir.launch_dir(directory) / "logs").glob(f"slurm-{job}_*.log")
            paths = [
                rundir.launch_dir(directory) / "logs" / f"slurm-{job}.log",
                *sorted(tasks, key=lambda path: (len(path.name), path.name)),
            ]
            if found := [Log(path, f"job {path.stem.removeprefix('slurm-')}") for path in paths if path.is_file()]:
                logs += found
                break
    if not logs:
        raise LaunchError(f"{run_dir} has no output of jobs yet; `megamem launch status` says whether one has started")
    return logs


def follow(run_dir: Path, find: Callable[[], list[Log]], lines: int) -> Iterator[tuple[Log, str]]:
    """The last ``lines`` lines of every log that ``find`` gives, then new ones as they are written, those of new logs included.

    Ends when the run has finished or was cancelled and nothing more is written.
    """
    known: dict[Path, Log] = {}
    while True:
        over = rundir.finished_file(run_dir).exists() or rundir.cancelled_file(run_dir).exists()
        quiet = True
        try:
            found = {log.path: log for log in find()}
        except LaunchError:  # between two incarnations there may be none
            if not known:
                raise
            found = dict(known)
        for path, log in [*known.items(), *((path, log) for path, log in found.items() if path not in known)]:
            new = log.more(rest=path not in found) if path in known else log.tail(lines)
            for line in new:
                quiet = False
                yield log, line
        known = {path: known.get(path, log) for path, log in found.items()}
        if over and quiet:
            yield from ((log, line) for log in known.values() for line in log.more(rest=True))
            return
        time.sleep(_POLL_SECONDS)


def _of_incarnation(directory: Path) -> list[Log]:
    logs = []
    for path in directory.glob("*.log"):
        rank = _RANK.fullmatch(path.name)
        source = f"{rank['node']} rank {int(rank['rank'])}" if rank else path.stem
        logs.append(Log(path, source, int(rank["rank"]) if rank else -1))
    return sorted(logs, key=lambda log: log.rank)


def _text(line: bytes) -> str:
    """A line as it stands on a terminal in the end: a progress bar writes over itself."""
    return line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]
