"""One start of a run's ranks, and the records of all of them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamem.errors import LaunchError
from megamem_launch import rundir

_FORM = re.compile(r"(.+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Incarnation:
    """``JOB.RESTART.ATTEMPT``."""

    job: str
    """SLURM's job id, or ``local-PID-SECONDS``: when it began, too, since in a container every supervisor may be process 1."""
    restart: int
    """How often SLURM restarted the job."""
    attempt: int
    """How often the supervisor restarted the ranks inside this allocation."""

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}.{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> Incarnation:
        """The inverse of ``str``; LaunchError for anything else."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise LaunchError(f"{text!r} is not an incarnation; it has the form JOB.RESTART.ATTEMPT, such as 1234.0.1")
        return cls(match[1], int(match[2]), int(match[3]))


def last_late_nodes(run_dir: Path) -> set[str]:
    """The nodes whose ranks were late in the hang that ended the last incarnation; none where it ended in another way."""
    ends = [record for record in rundir.read_lines(rundir.incarnations_file(run_dir)) if record.get("event") == "end"]
    return set(ends[-1].get("late_nodes", ())) if ends and ends[-1]["outcome"] == "hang" else set()


def record_start(run_dir: Path, incarnation: Incarnation, *, nodes: Sequence[str], step: int) -> None:
    """Append the start of ``incarnation``, which goes on from the checkpoint of ``step`` (0: from nothing)."""
    rundir.append_json(
        rundir.incarnations_file(run_dir),
        {
            "time": round(time.time(), 3),
            "incarnation": str(incarnation),
            "event": "start",
            "job_id": incarnation.job,
            "restart": incarnation.restart,
            "attempt": incarnation.attempt,
            "nodes": list(nodes),
            "step": step,
        },
    )


def record_end(
    run_dir: Path,
    incarnation: Incarnation,
    *,
    outcome: str,
    reason: str,
    step: int,
    bad_nodes: Mapping[str, str],
    stragglers: Mapping[str, Any] | None,
    late_nodes: Sequence[str] = (),
) -> None:
    """Append the end of ``incarnation``, whose newest checkpoint is of ``step``."""
    rundir.append_json(
        rundir.incarnations_file(run_dir),
        {
            "time": round(time.time(), 3),
            "incarnation": str(incarnation),
            "event": "end",
            "outcome": outcome,
            "reason": reason,
            "step": step,
            "bad_nodes": dict(bad_nodes),
            "late_nodes": list(late_nodes),
            "stragglers": dict(stragglers) if stragglers else None,
        },
    )
