"""Reports: one HTML file that needs no network, of a run or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from megamem.errors import DataError
from megamem.files import write_text
from megamem.observe.charts import COLORS, Series, column
from megamem.observe.journal import Entry, read_journal
from megamem.observe.memory_charts import access_sections
from megamem.observe.progress import format_bytes, format_duration
from megamem.observe.report_compare import comparison_charts, differing_settings, headline_rows, read_runs
from megamem.observe.report_events import events_of, marks_of, utc
from megamem.observe.report_figures import phase_series, step_charts
from megamem.observe.report_numbers import further, headlines, of_kind, parameters_of, read_summary, shares
from megamem.observe.report_tables import gate_sections, table_usage, usage_chart
from megamem.observe.timeline import timeline


def build_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run to ``out``, by default ``report.html`` in its directory, and return that path.

    Raises:
        DataError: the journal is missing or damaged, or the report cannot be written.
    """
    journal = run_dir / "journal.jsonl"
    entries, history = read_journal(journal), read_journal(journal, overtaken=True)
    summary, events = read_summary(run_dir, entries), events_of(run_dir, history)
    marks = marks_of(events)
    steps = of_kind(entries, "step")
    config = run_dir / "config.yaml"
    usage = usage_chart(entries, [mark for mark in marks if mark.kind != "skip"])
    page = _template("report.html.j2").render(
        name=run_dir.resolve().name,
        subtitle=_subtitle(entries),
        headlines=headlines(summary),
        parameters=shares(parameters_of(summary)),
        phases=_phase_shares(phase_series(steps)),
        accounted=_accounted(entries),
        timeline=timeline(events, entries[-1]["time"]) if entries else "",
        charts=step_charts(entries, marks),
        gates=gate_sections(entries),
        usage=table_usage(entries),
        usage_chart=usage if usage.svg else None,
        access=access_sections(entries),
        events=events,
        further=further(summary),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )
    return _write(out or run_dir / "report.html", page)


def build_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write a page that shows several runs side by side to ``out``, and return that path. DataError as :func:`build_report`."""
    runs = read_runs(list(run_dirs))
    page = _template("comparison.html.j2").render(
        name=f"{len(runs)} runs",
        runs=[(run.name, _subtitle(run.entries)) for run in runs],
        colors=COLORS,
        numbers=headline_rows(runs),
        settings=differing_settings(runs),
        charts=comparison_charts(runs),
    )
    return _write(out, page)


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("megamem.observe"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _write(path: Path, page: str) -> Path:
    try:
        write_text(path, page)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}): free space there, or name another place with `megamem report --out`"
        ) from None
    return path


def _phase_shares(series: list[Series]) -> list[tuple[str, str, float]]:
    """Name, time and share of each phase over all steps, in the order of their colours."""
    sums = [(one.name, float(np.nansum(one.y))) for one in series]
    whole = sum(seconds for _, seconds in sums)
    return [(name, _short(seconds), seconds / whole) for name, seconds in sums] if whole else []


def _short(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 100 else f"{seconds:.2g} s"


def _accounted(entries: list[Entry]) -> list[tuple[str, str, float]]:
    """Kind, bytes and share of the memory that the last start added up for the busiest rank."""
    measured = of_kind(entries, "accounting")
    parts = {kind: size for kind, size in measured[-1].get("largest", {}).items() if size} if measured else {}
    whole = sum(parts.values())
    return [(kind.replace("_", ", "), format_bytes(size), size / whole) for kind, size in parts.items()]


def _subtitle(entries: list[Entry]) -> str:
    if not entries:
        return "Nothing has been measured yet."
    starts = sum(e.get("event") == "start" for e in entries)
    resumed = f", resumed {starts - 1} time{'s' if starts > 2 else ''}" if starts > 1 else ""
    trained = column(of_kind(entries, "step"), "step_seconds")
    spent = f", {format_duration(float(np.nansum(trained)))} in steps" if np.isfinite(trained).any() else ""
    return f"{utc(entries[0]['time'])} to {utc(entries[-1]['time'])} UTC{spent}{resumed}"
