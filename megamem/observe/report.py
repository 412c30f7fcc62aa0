"""The report of a run: one HTML file that needs no network, made from its journal, its settings and its summary.

``summary.json`` is optional: a JSON object whose keys override those of :func:`summarize` and may add ``parameters``
(``{kind: count}``) and further plain numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megamem.errors import DataError
from megamem.observe.charts import Series, line_chart, smooth
from megamem.observe.journal import Entry, read_journal
from megamem.observe.progress import format_count, format_duration


@dataclass(frozen=True, slots=True)
class Headline:
    """One number at the top of a report."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure of a report."""

    title: str
    svg: Markup
    legend: list[tuple[str, int, str]]
    """Name, colour number and style of each line."""


def build_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` and return its path. Raises DataError if the journal is missing or damaged."""
    journal = run_dir / "journal.jsonl"
    entries = read_journal(journal)
    summary = read_summary(run_dir, entries)
    config = run_dir / "config.yaml"
    environment = Environment(
        loader=PackageLoader("megamem.observe"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        subtitle=_subtitle(entries),
        headlines=headlines(summary),
        parameters=_parameters(summary),
        charts=_charts(entries),
        gates=_gates(entries),
        usage=_usage(entries),
        events=_events(read_journal(journal, overtaken=True)),
        further=_further(summary),
        config=config.read_text() if config.exists() else "",
    )
    path = run_dir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def summarize(entries: list[Entry]) -> dict[str, Any]:
    """The numbers of a run that its journal alone tells. Keys without a measurement are absent.

    ``steps``, ``tokens`` (counted in the loss), ``seconds`` (in steps), ``skipped_steps``; ``tokens_per_second`` (median over
    steps), ``stall_share`` (of the time in steps), ``unique_ratio`` (mean of unique rows per lookup);
    ``validation_loss_start``, ``validation_loss_end``, ``validation_loss_blocked`` (last one with the memories blocked).
    """
    steps = _of_kind(entries, "step")
    seconds = np.nansum(_column(steps, "step_seconds"))
    summary: dict[str, Any] = {
        "steps": len(steps),
        "tokens": float(np.nansum(_column(steps, "loss_tokens"))),
        "seconds": float(seconds),
        "skipped_steps": int(np.nansum(_column(steps, "skipped"))),
        "tokens_per_second": _finite(np.nanmedian, _column(steps, "tokens_per_second")),
        "unique_ratio": _finite(np.nanmean, _column(steps, "unique_ratio")),
        "stall_share": float(np.nansum(_column(steps, "stall_seconds")) / seconds) if seconds else None,
    }
    evaluations = [e for e in _of_kind(entries, "eval") if e.get("loss") is not None]
    whole = [e["loss"] for e in evaluations if not e.get("blocked")]
    blocked = [e["loss"] for e in evaluations if e.get("blocked")]
    summary["validation_loss_start"] = whole[0] if len(whole) > 1 else None
    summary["validation_loss_end"] = whole[-1] if whole else None
    summary["validation_loss_blocked"] = blocked[-1] if blocked else None
    return {key: value for key, value in summary.items() if value is not None}


def read_summary(run_dir: Path, entries: list[Entry]) -> dict[str, Any]:
    """:func:`summarize`, with ``summary.json`` on top where the run has one."""
    path = run_dir / "summary.json"
    try:
        extra = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise DataError(f"{path} is not a JSON object: remove it to report from the journal alone")
    return summarize(entries) | {key: value for key, value in extra.items() if value is not None}


def headlines(summary: Mapping[str, Any]) -> list[Headline]:
    """The numbers of a summary that come first, as text."""
    result = []
    end, start, blocked = (summary.get(f"validation_loss_{k}") for k in ("end", "start", "blocked"))
    if end is not None:
        result.append(Headline("Validation loss", f"{end:.4f}", f"from {start:.4f}" if start is not None else ""))
    if blocked is not None:
        note = f"{blocked - end:+.4f} when no memory is read" if end is not None else "when no memory is read"
        result.append(Headline("Memory blocked", f"{blocked:.4f}", note))
    if parameters := summary.get("parameters"):
        kinds = ", ".join(f"{format_count(count)} {kind}" for kind, count in parameters.items() if count)
        result.append(Headline("Parameters", format_count(sum(parameters.values())), kinds))
    if (speed := summary.get("tokens_per_second")) is not None:
        stall = summary.get("stall_share")
        note = f"waiting for tables {stall:.1%} of the time" if stall is not None else ""
        result.append(Headline("Tokens per second", format_count(speed), note))
    if (ratio := summary.get("unique_ratio")) is not None:
        result.append(Headline("Unique rows", f"{ratio:.1%}", "of the rows looked up in a step"))
    if steps := summary.get("steps"):
        parts = [f"{format_count(summary['tokens'])} tokens"] if summary.get("tokens") else []
        parts += [format_duration(summary["seconds"])] if summary.get("seconds") else []
        parts += [f"{summary['skipped_steps']} skipped"] if summary.get("skipped_steps") else []
        result.append(Headline("Steps", f"{steps:,}", ", ".join(parts)))
    return result


def _charts(entries: list[Entry]) -> list[Chart]:
    steps, evaluations = _of_kind(entries, "step"), [e for e in _of_kind(entries, "eval") if e.get("loss") is not None]
    resumes = [e["step"] for e in entries if e.get("event") == "start" and e["step"] > 0]
    whole = [e for e in evaluations if not e.get("blocked")]
    blocked = [e for e in evaluations if e.get("blocked")]
    validation = [
        Series(name, _column(group, "step"), _column(group, "loss"), color, "points")
        for name, group, color in (("validation", whole, 1), ("validation, memory blocked", blocked, 2))
        if group
    ]
    figures = [
        ("Loss", [*_raw_and_smooth("training", steps, "loss"), *validation], False),
        ("Auxiliary loss", _raw_and_smooth("auxiliary loss", steps, "aux_loss"), False),
        ("Learning rate", _lines(steps, {"learning rate": "lr"}), True),
        ("Gradient norm", _lines(steps, {"all parameters": "grad_norm", "tables": "grad_norm_tables"}), False),
        ("Tokens per second", _raw_and_smooth("tokens per second", steps, "tokens_per_second"), True),
        ("Seconds per step", _lines(steps, {"whole step": "step_seconds", "waiting for tables": "stall_seconds"}), True),
        ("Unique rows per lookup", _lines(steps, {"unique rows": "unique_ratio"}), False),
        ("Bytes received by the exchange", _lines(steps, {"bytes per step": "bytes_received"}), True),
        ("Memory (GiB)", _lines(steps, {"memory": "memory_bytes"}, scale=2.0**-30), True),
    ]
    charts = []
    for title, series, from_zero in figures:
        if svg := line_chart(title, series, marks=resumes, from_zero=from_zero):
            charts.append(Chart(title, svg, [(s.name, s.color, s.style) for s in series] if len(series) > 1 else []))
    return charts


def _lines(steps: list[Entry], keys: Mapping[str, str], scale: float = 1.0) -> list[Series]:
    x = _column(steps, "step")
    series = [Series(name, x, _column(steps, key) * scale, color) for color, (name, key) in enumerate(keys.items())]
    return [s for s in series if np.isfinite(s.y).any()]


def _raw_and_smooth(name: str, steps: list[Entry], key: str) -> list[Series]:
    """A noisy line behind its mean, whose half-life is a fiftieth of the run; short runs have the line alone."""
    x, y = _column(steps, "step"), _column(steps, key)
    if np.isfinite(y).sum() < 30:
        return [Series(name, x, y)] if np.isfinite(y).any() else []
    return [Series(f"{name}, each step", x, y, 0, "raw"), Series(f"{name}, smoothed", x, smooth(y, len(y) / 50))]


def _gates(entries: list[Entry]) -> dict[str, Any]:
    """The last gate measurement: per layer, every token with its gate and the place of the gate in the layer's own range."""
    measured = _of_kind(entries, "gates")
    if not measured:
        return {}
    entry, layers = measured[-1], []
    tokens = [_readable(piece) for piece in entry["tokens"]]
    for layer, values in zip(entry["layers"], entry["gates"], strict=True):
        gates = np.array([np.nan if v is None else v for v in values], dtype=float)
        if len(gates) != len(tokens):
            raise DataError(f"the journal has {len(tokens)} tokens but {len(gates)} gates of layer {layer} at step {entry['step']}")
        low, high = np.nanpercentile(gates, [2, 98]) if np.isfinite(gates).any() else (0.0, 1.0)
        shade = np.nan_to_num(np.clip((gates - low) / max(high - low, 1e-9), 0, 1))
        layers.append({"layer": layer, "low": low, "high": high, "tokens": list(zip(tokens, gates, shade, strict=True))})
    return {"step": entry["step"], "layers": layers}


def _readable(piece: str) -> str:
    """A sentencepiece piece as text; line breaks stay visible."""
    text = piece.replace("\u2581", " ").replace("<0x0A>", "\n")
    return text.replace("\n", "↵\n")


def _usage(entries: list[Entry]) -> dict[str, Any]:
    measured = [e for e in _of_kind(entries, "tables") if e.get("usage")]
    return {"step": measured[-1]["step"], "tables": measured[-1]["usage"]} if measured else {}


def _parameters(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Kind, count and share of each kind of parameter."""
    counts = {kind: count for kind, count in (summary.get("parameters") or {}).items() if count}
    total = sum(counts.values())
    return [(kind, format_count(count), count / total) for kind, count in counts.items()]


_SUMMARIZED = {
    "parameters", "steps", "tokens", "seconds", "skipped_steps", "tokens_per_second", "unique_ratio", "stall_share",
    "validation_loss_start", "validation_loss_end", "validation_loss_blocked",
}  # fmt: skip


def _further(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Plain values of a summary that no other part of the report shows."""
    return [
        (key.replace("_", " "), f"{value:,.6g}" if isinstance(value, float) else str(value))
        for key, value in summary.items()
        if key not in _SUMMARIZED and isinstance(value, (int, float, str))
    ]


def _events(entries: list[Entry]) -> list[dict[str, Any]]:
    """What happened, in order, from a journal with its overtaken entries: events, skipped steps, and kills, which are seen
    from a start whose predecessor had neither stopped nor failed."""
    rows: list[dict[str, Any]] = []
    told = {e["step"] for e in entries if e.get("event") == "skip"}
    running = False
    for previous, entry in zip([None, *entries], entries, strict=False):
        name = entry.get("event")
        if name == "start":
            if running and previous:
                rows.append(_row(previous, "killed", {}))
            running = True
            rows.append(_row(entry, "resume" if entry["step"] else "start", _details(entry)))
        elif name:
            running = running and name not in ("stop", "fail")
            rows.append(_row(entry, name, _details(entry)))
        elif entry.get("skipped") and entry["step"] not in told:
            rows.append(_row(entry, "skip", {key: entry.get(key) for key in ("loss", "grad_norm")}))
    return rows


def _details(event: Entry) -> dict[str, Any]:
    return {k: v for k, v in event.items() if k not in ("time", "kind", "step", "event")}


def _row(entry: Entry, event: str, details: Mapping[str, Any]) -> dict[str, Any]:
    shown = ", ".join(f"{k.replace('_', ' ')} {'not finite' if v is None else v}" for k, v in details.items())
    return {"time": _utc(entry["time"]), "step": entry["step"], "event": event, "details": shown}


def _subtitle(entries: list[Entry]) -> str:
    if not entries:
        return "Nothing has been measured yet."
    starts = sum(e.get("event") == "start" for e in entries)
    resumed = f", resumed {starts - 1} time{'s' if starts > 2 else ''}" if starts > 1 else ""
    return f"{_utc(entries[0]['time'])} to {_utc(entries[-1]['time'])} UTC{resumed}"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _of_kind(entries: list[Entry], kind: str) -> list[Entry]:
    return [e for e in entries if e["kind"] == kind]


def _column(entries: list[Entry], key: str) -> np.ndarray:
    """One key of all entries as float64, NaN where it is absent or null."""
    values = (entry.get(key) for entry in entries)
    return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)


def _finite(reduce: Any, values: np.ndarray) -> float | None:
    return float(reduce(values)) if np.isfinite(values).any() else None
