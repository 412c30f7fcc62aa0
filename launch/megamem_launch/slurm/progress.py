"""How far a run is and how fast, from the end of its journal."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamem.errors import ConfigError
from megamem_launch.config import read_yaml
from megamem_launch.rundir import submission_folders

_TAIL_BYTES = 1 << 18  # of the journal: enough for some hundred steps
_RECENT = 20  # steps that the speed is a median of


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is and how fast."""

    step: int = 0
    total_steps: int | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    eta_seconds: float | None = None


def read_progress(run_dir: Path) -> Progress:
    """Steps done and speed (medians of the last steps) from the end of the journal, and what is left to do."""
    steps = [entry for entry in tail_entries(run_dir / "journal.jsonl") if entry.get("kind") == "step"][-_RECENT:]
    total = _total_steps(run_dir)
    if not steps:
        return Progress(total_steps=total)
    step = int(steps[-1]["step"])
    seconds = _median(steps, "step_seconds")
    return Progress(
        step=step,
        total_steps=total,
        tokens_per_second=_median(steps, "tokens_per_second"),
        step_seconds=seconds,
        eta_seconds=max(0, total - step) * seconds if total is not None and seconds is not None else None,
    )


def _total_steps(run_dir: Path) -> int | None:
    """What the last submission asks for; a run that has not started yet has no configuration of its own."""
    newest = [folder / "config.yaml" for folder in submission_folders(run_dir)[-1:]]
    for path in (*newest, run_dir / "config.yaml"):
        with contextlib.suppress(ConfigError, KeyError, TypeError, ValueError):
            return int(read_yaml(path)["train"]["steps"])
    return None


def tail_entries(path: Path, size: int = _TAIL_BYTES) -> list[dict[str, Any]]:
    """The whole lines of JSON in the last ``size`` bytes of a file; none where there is no file."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    entries = []
    for line in lines[1 if start else 0 : -1]:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)]


def _median(entries: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [float(entry[key]) for entry in entries if isinstance(entry.get(key), (int, float))]
    return statistics.median(values) if values else None
