"""The report of a run: one HTML file that needs no network, made from its journal, its settings and its summary.

``summary.json`` is optional: a JSON object whose keys override those of :func:`summarize` and may add ``parameters``
(``{kind: count}``, ``total`` beside them) and further plain values.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from megamem.errors import DataError
from megamem.observe.charts import Chart, Series, chart, column, lines, smooth
from megamem.observe.journal import Entry, read_journal
from megamem.observe.memory_charts import access_sections, traffic_charts
from megamem.observe.progress import format_count, format_duration
from megamem.observe.tracking import flatten


@dataclass(frozen=True, slots=True)
class Headline:
    """One number at the top of a report."""

    label: str
    value: str
    note: str = ""


def build_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` and return its path. DataError if the journal is missing or damaged, or the
    report cannot be written.
    """
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
        parameters=_shares(_parameters(summary)),
        charts=_charts(entries),
        gates=_gates(entries),
        usage=_usage(entries),
        access=access_sections(entries),
        events=_events(read_journal(journal, overtaken=True)),
        further=_further(summary),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )
    path = run_dir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataError(f"{path} cannot be written ({error.strerror}): free space there, or copy the run") from None
    return path


def summarize(entries: list[Entry]) -> dict[str, Any]:
    """The numbers of a run that its journal alone tells. Keys without a measurement are absent.

    ``steps``, ``tokens_seen`` (those that count in the loss), ``seconds`` (in steps), ``skipped_steps``;
    ``tokens_per_second`` (median over steps), ``stall_share`` (of the time in steps), ``unique_row_ratio`` (unique rows
    per lookup), ``patch_ratio`` (patched rows per row fetched); ``validation_loss`` with ``first``, ``last`` and
    ``last_blocked`` (memories blocked).
    """
    steps = _of_kind(entries, "step")
    seconds, lookups, fetched = (_total(steps, key) for key in ("step_seconds", "lookups", "rows_received"))
    speed = column(steps, "tokens_per_second")
    whole, blocked = _evaluations(entries, blocked=False), _evaluations(entries, blocked=True)
    losses = {
        "first": whole[0]["loss"] if len(whole) > 1 else None,
        "last": whole[-1]["loss"] if whole else None,
        "last_blocked": blocked[-1]["loss"] if blocked else None,
    }
    summary = {
        "steps": len(steps),
        "tokens_seen": int(_total(steps, "loss_tokens")),
        "seconds": seconds,
        "skipped_steps": int(_total(steps, "skipped")),
        "tokens_per_second": float(np.nanmedian(speed)) if np.isfinite(speed).any() else None,
        "unique_row_ratio": _total(steps, "unique_rows") / lookups if lookups else None,
        "patch_ratio": _total(steps, "patched_rows") / fetched if fetched else None,
        "stall_share": _total(steps, "stall_seconds") / seconds if seconds else None,
        "validation_loss": {name: loss for name, loss in losses.items() if loss is not None},
    }
    return {key: value for key, value in summary.items() if value is not None}


def read_summary(run_dir: Path, entries: list[Entry]) -> dict[str, Any]:
    """:func:`summarize`, with ``summary.json`` on top where the run has one."""
    path = run_dir / "summary.json"
    try:
        extra = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise DataError(f"{path} is not a JSON object: remove it to report from the journal alone")
    return summarize(entries) | {key: value for key, value in extra.items() if value is not None}


def headlines(summary: Mapping[str, Any]) -> list[Headline]:
    """The numbers of a summary that come first, as text."""
    result = []
    first, last, blocked = (summary["validation_loss"].get(name) for name in ("first", "last", "last_blocked"))
    if last is not None:
        result.append(Headline("Validation loss", f"{last:.4f}", f"from {first:.4f}" if first is not None else ""))
    if blocked is not None:
        note = f"{blocked - last:+.4f} when no memory is read" if last is not None else "when no memory is read"
        result.append(Headline("Memory blocked", f"{blocked:.4f}", note))
    if parameters := _parameters(summary):
        total = format_count(sum(count for _, count in parameters))
        result.append(
            Headline("Parameters", total, ", ".join(f"{format_count(count)} {kind}" for kind, count in parameters))
        )
    if (speed := summary.get("tokens_per_second")) is not None:
        stall = summary.get("stall_share")
        note = f"waiting for tables {stall:.1%} of the time" if stall is not None else ""
        result.append(Headline("Tokens per second", format_count(speed), note))
    if (ratio := summary.get("unique_row_ratio")) is not None:
        patched = summary.get("patch_ratio")
        note = f", {patched:.1%} patched before use" if patched else ""
        result.append(Headline("Unique rows", f"{ratio:.1%}", f"of the rows looked up in a step{note}"))
    if steps := summary["steps"]:
        notes = [f"{format_count(summary['tokens_seen'])} tokens"] if summary["tokens_seen"] else []
        notes += [format_duration(summary["seconds"])] if summary["seconds"] else []
        notes += [f"{summary['skipped_steps']} skipped"] if summary["skipped_steps"] else []
        result.append(Headline("Steps", f"{steps:,}", ", ".join(notes)))
    return result


def _charts(entries: list[Entry]) -> list[Chart]:
    """What there is to show over the steps."""
    steps = _of_kind(entries, "step")
    resumes = [e["step"] for e in entries if e.get("event") == "start" and e["step"] > 0]
    validation = [
        Series(name, column(group, "step"), column(group, "loss"), color, "points")
        for name, color, group in (
            ("validation", 1, _evaluations(entries, blocked=False)),
            ("validation, memory blocked", 2, _evaluations(entries, blocked=True)),
        )
        if group
    ]
    times = {"whole step": "step_seconds", "waiting for tables": "stall_seconds", "fetching rows": "fetch_seconds"}
    figures = [
        ("Auxiliary loss", _raw_and_smooth("auxiliary loss", steps, "aux_loss"), False),
        ("Learning rate", lines(steps, {"learning rate": "lr"}), True),
        ("Gradient norm", lines(steps, {"all parameters": "grad_norm", "tables": "grad_norm_tables"}), False),
        ("Tokens per second", _raw_and_smooth("tokens per second", steps, "tokens_per_second"), True),
        ("Seconds per step", lines(steps, times), True),
        ("Memory (GiB)", lines(steps, {"memory": "memory_bytes"}, scale=2.0**-30), True),
    ]
    charts = [
        chart("Loss", [*_raw_and_smooth("training", steps, "loss"), *validation], wide=True, marks=resumes),
        *(chart(title, series, marks=resumes, from_zero=from_zero) for title, series, from_zero in figures),
        *traffic_charts(steps, resumes),
    ]
    return [one for one in charts if one.svg]


def _raw_and_smooth(name: str, steps: list[Entry], key: str) -> list[Series]:
    """A noisy line behind its mean over about a fiftieth of the run; short runs have the line alone."""
    x, y = column(steps, "step"), column(steps, key)
    if np.isfinite(y).sum() < 30:
        return [Series(name, x, y)] if np.isfinite(y).any() else []
    return [Series(f"{name}, each step", x, y, 0, "raw"), Series(f"{name}, smoothed", x, smooth(y, len(y) / 100))]


def _gates(entries: list[Entry]) -> dict[str, Any]:
    """The last gate measurement: per layer, every token with its gate and the gate's place in the layer's own range."""
    measured = _of_kind(entries, "gates")
    if not measured:
        return {}
    entry, layers = measured[-1], []
    tokens = [_readable(piece) for piece in entry["tokens"]]
    for layer, values in zip(entry["layers"], entry["gates"], strict=True):
        gates = np.array([np.nan if v is None else v for v in values], dtype=float)
        if len(gates) != len(tokens):
            raise DataError(
                f"the journal has {len(tokens)} tokens but {len(gates)} gates of layer {layer} at step {entry['step']}"
            )
        low, high = np.nanpercentile(gates, [2, 98]) if np.isfinite(gates).any() else (0.0, 1.0)
        shade = np.nan_to_num(np.clip((gates - low) / max(high - low, 1e-9), 0, 1))
        layers.append(
            {"layer": layer, "low": low, "high": high, "tokens": list(zip(tokens, gates, shade, strict=True))}
        )
    return {"step": entry["step"], "layers": layers}


def _readable(piece: str) -> str:
    """A sentencepiece piece as text; line breaks stay visible."""
    text = piece.replace("\u2581", " ").replace("<0x0A>", "\n")
    return text.replace("\n", "↵\n")


def _usage(entries: list[Entry]) -> dict[str, Any]:
    measured = [e for e in _of_kind(entries, "tables") if e.get("usage")]
    return {"step": measured[-1]["step"], "tables": measured[-1]["usage"]} if measured else {}


def _parameters(summary: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Kinds of parameters and their counts."""
    counts = summary.get("parameters") or {}
    return [(kind, count) for kind, count in counts.items() if count and kind != "total"]


def _shares(parameters: list[tuple[str, int]]) -> list[tuple[str, str, float]]:
    """Kind, count and share of the whole of each kind of parameter."""
    total = sum(count for _, count in parameters)
    return [(kind, format_count(count), count / total) for kind, count in parameters]


def _further(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Values of a summary that no other part of the report shows."""
    shown = {
        "name",
        "parameters",
        *summarize([]),
        "tokens_per_second",
        "unique_row_ratio",
        "patch_ratio",
        "stall_share",
    }
    rest = flatten({key: value for key, value in summary.items() if key not in shown})
    return [
        (key.replace("_", " "), f"{value:,.6g}" if isinstance(value, float) else str(value))
        for key, value in rest.items()
    ]


def _events(entries: list[Entry]) -> list[dict[str, Any]]:
    """What happened, in order, from a journal with its overtaken entries: events, skipped steps, and kills.

    A kill is seen from a start whose predecessor had neither stopped nor failed.
    """
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
    shown = [
        v if k == "text" else f"{k.replace('_', ' ')} {'not finite' if v is None else v}" for k, v in details.items()
    ]
    return {"time": _utc(entry["time"]), "step": entry["step"], "event": event, "details": ", ".join(shown)}


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


def _total(entries: list[Entry], key: str) -> float:
    return float(np.nansum(column(entries, key)))


def _evaluations(entries: list[Entry], *, blocked: bool) -> list[Entry]:
    return [e for e in _of_kind(entries, "eval") if e.get("loss") is not None and bool(e.get("blocked")) is blocked]
