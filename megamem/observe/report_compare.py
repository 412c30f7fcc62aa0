"""Several runs side by side: curves over each other, headline numbers, and the settings that differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megamem.observe.charts import COLORS, Chart, Series, chart, column, smooth
from megamem.observe.journal import Entry, read_journal
from megamem.observe.progress import format_bytes, format_count, format_duration
from megamem.observe.report_events import Event, events_of
from megamem.observe.report_numbers import evaluations, of_kind, read_summary
from megamem.observe.tracking_points import flatten

_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Run:
    """What a comparison knows of one run."""

    name: str
    """Shortest end of its path that no other run of the page has."""
    entries: list[Entry]
    events: list[Event]
    summary: dict[str, Any]
    settings: dict[str, Any]


def read_runs(run_dirs: list[Path]) -> list[Run]:
    """The runs in these directories. DataError if a journal is missing or damaged."""
    runs = []
    for run_dir, name in zip(run_dirs, _names(run_dirs), strict=True):
        journal, config = run_dir / "journal.jsonl", run_dir / "config.yaml"
        entries = read_journal(journal)
        events = events_of(run_dir, read_journal(journal, overtaken=True))
        settings = flatten(yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.exists() else {}
        runs.append(Run(name, entries, events, read_summary(run_dir, entries), settings))
    return runs


def headline_rows(runs: list[Run]) -> list[tuple[str, list[str], int | None]]:
    """Rows of the table of numbers: name, one text per run, and which run is best where that can be said."""
    rows = []
    for name, read, text, better in _NUMBERS:
        values = [read(run) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = better(known) if better and len(known) > 1 and len(set(known)) > 1 else None
        rows.append(
            (
                name,
                [_ABSENT if v is None else text(v) for v in values],
                values.index(best) if best is not None else None,
            )
        )
    return rows


def differing_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with their values as text. Names and places of the runs do not count."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = []
    for key in keys:
        values = [str(run.settings[key]) if key in run.settings else _ABSENT for run in runs]
        if key not in ("name", "runs_dir") and len(set(values)) > 1:
            rows.append((key, values))
    return rows


def comparison_charts(runs: list[Run]) -> list[Chart]:
    """Curves of all runs over each other."""
    figures: list[tuple[str, list[Series], bool, bool, str]] = [
        ("Training loss", _curves(runs, "loss", smoothed=True), False, True, "step"),
        ("Validation loss", _validation(runs, blocked=False), False, False, "step"),
        ("Validation loss, memory blocked", _validation(runs, blocked=True), False, False, "step"),
        ("Training loss over tokens", _curves(runs, "loss", over="loss_tokens", smoothed=True), False, False, "tokens"),
        (
            "Training loss over minutes in steps",
            _curves(runs, "loss", over="step_seconds", unit=60.0, smoothed=True),
            False,
            False,
            "minutes",
        ),
        ("Tokens per second", _curves(runs, "tokens_per_second", smoothed=True), True, False, "step"),
        ("Seconds per step", _curves(runs, "step_seconds", smoothed=True), True, False, "step"),
        ("Gradient norm", _curves(runs, "grad_norm", smoothed=True), False, False, "step"),
        ("Learning rate", _curves(runs, "lr"), True, False, "step"),
        ("Memory (GiB)", _curves(runs, "memory_bytes", scale=2.0**-30), True, False, "step"),
        ("Waiting for tables (seconds per step)", _curves(runs, "stall_seconds", smoothed=True), True, False, "step"),
        ("Unique rows (% of those looked up)", _curves(runs, "unique_ratio", scale=100.0), True, False, "step"),
    ]
    charts = [
        chart(title, series, from_zero=from_zero, wide=wide, x_name=x_name)
        for title, series, from_zero, wide, x_name in figures
    ]
    return [one for one in charts if one.svg]


def _curves(
    runs: list[Run],
    key: str,
    *,
    over: str = "",
    unit: float = 1.0,
    scale: float = 1.0,
    smoothed: bool = False,
) -> list[Series]:
    """One line per run of a step's key, over the steps or over the running sum of the key ``over`` in ``unit``."""
    series = []
    for number, run in enumerate(runs):
        steps = of_kind(run.entries, "step")
        y = column(steps, key) * scale
        if not np.isfinite(y).any():
            continue
        x = np.cumsum(np.nan_to_num(column(steps, over))) / unit if over else column(steps, "step")
        if smoothed and np.isfinite(y).sum() >= 30:
            y = smooth(y, len(y) / 100)
        series.append(Series(run.name, x, y, number % COLORS))
    return series


def _validation(runs: list[Run], *, blocked: bool) -> list[Series]:
    measured = [evaluations(run.entries, blocked=blocked) for run in runs]
    return [
        Series(run.name, column(group, "step"), column(group, "loss"), number % COLORS, "points")
        for number, (run, group) in enumerate(zip(runs, measured, strict=True))
        if group
    ]


def _names(run_dirs: list[Path]) -> list[str]:
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{run_dir.name} ({number})" for number, run_dir in enumerate(run_dirs, start=1)]


def _key(name: str) -> Callable[[Run], Any]:
    return lambda run: run.summary.get(name)


def _loss(name: str) -> Callable[[Run], Any]:
    return lambda run: run.summary["validation_loss"].get(name)


def _troubles(run: Run) -> int:
    return sum(event.kind == "trouble" for event in run.events)


_NUMBERS: tuple[tuple[str, Callable[[Run], Any], Callable[[Any], str], Callable[[list[Any]], Any] | None], ...] = (
    ("Validation loss", _loss("last"), "{:.4f}".format, min),
    ("Validation loss, memory blocked", _loss("last_blocked"), "{:.4f}".format, min),
    ("Steps", _key("steps"), "{:,}".format, None),
    ("Tokens", _key("tokens_seen"), format_count, None),
    ("Time in steps", _key("seconds"), format_duration, None),
    ("Tokens per second", _key("tokens_per_second"), format_count, max),
    ("Waiting for tables", _key("stall_share"), "{:.1%}".format, min),
    ("Unique rows", _key("unique_row_ratio"), "{:.1%}".format, None),
    ("Peak memory", _key("peak_memory_bytes"), format_bytes, min),
    ("Parameters", lambda run: (run.summary.get("parameters") or {}).get("total"), format_count, None),
    ("Skipped steps", _key("skipped_steps"), "{:,}".format, None),
    ("Kills, hangs and failures", _troubles, "{:,}".format, None),
    ("Ranks", _key("world_size"), "{:,}".format, None),
    ("Device", _key("device"), str, None),
)
