"""The numbers of a run: what its journal and its ``summary.json`` tell of it as a whole.

``summary.json`` is optional: a JSON object whose keys override those of :func:`summarize` and may add ``parameters``
(``{kind: count}``, ``total`` beside them) and further plain values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamem.errors import DataError
from megamem.observe.charts import column
from megamem.observe.journal import Entry
from megamem.observe.progress import format_count, format_duration
from megamem.observe.tracking_points import flatten

PHASE = "seconds/"
"""Prefix of a step's keys that tell how long it was in each phase."""


@dataclass(frozen=True, slots=True)
class Headline:
    """One number at the top of a report."""

    label: str
    value: str
    note: str = ""


def summarize(entries: list[Entry]) -> dict[str, Any]:
    """The numbers of a run that its journal alone tells. Keys without a measurement are absent.

    ``steps``, ``tokens_seen`` (those that count in the loss), ``seconds`` (in steps), ``skipped_steps``;
    ``tokens_per_second`` (median over steps), ``stall_share`` (of the time in steps), ``unique_row_ratio`` (unique rows
    per lookup), ``patch_ratio`` (patched rows per row fetched); ``validation_loss`` with ``first``, ``last`` and
    ``last_blocked`` (memories blocked).
    """
    steps = of_kind(entries, "step")
    seconds, lookups, fetched = (total(steps, key) for key in ("step_seconds", "lookups", "rows_received"))
    speed = column(steps, "tokens_per_second")
    whole, blocked = evaluations(entries, blocked=False), evaluations(entries, blocked=True)
    losses = {
        "first": whole[0]["loss"] if len(whole) > 1 else None,
        "last": whole[-1]["loss"] if whole else None,
        "last_blocked": blocked[-1]["loss"] if blocked else None,
    }
    summary = {
        "steps": len(steps),
        "tokens_seen": int(total(steps, "loss_tokens")),
        "seconds": seconds,
        "skipped_steps": int(total(steps, "skipped")),
        "tokens_per_second": float(np.nanmedian(speed)) if np.isfinite(speed).any() else None,
        "unique_row_ratio": total(steps, "unique_rows") / lookups if lookups else None,
        "patch_ratio": total(steps, "patched_rows") / fetched if fetched else None,
        "stall_share": total(steps, "stall_seconds") / seconds if seconds else None,
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
        note = f"from {first:.4f}" if first is not None else "of one evaluation"
        result.append(Headline("Validation loss", f"{last:.4f}", note))
    if blocked is not None:
        note = f"{blocked - last:+.4f} when no memory is read" if last is not None else "when no memory is read"
        result.append(Headline("Memory blocked", f"{blocked:.4f}", note))
    if parameters := parameters_of(summary):
        count_all = format_count(sum(count for _, count in parameters))
        result.append(
            Headline("Parameters", count_all, ", ".join(f"{format_count(count)} {kind}" for kind, count in parameters))
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


def parameters_of(summary: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Kinds of parameters and their counts."""
    counts = summary.get("parameters") or {}
    return [(kind, count) for kind, count in counts.items() if count and kind != "total"]


def shares(parameters: list[tuple[str, int]]) -> list[tuple[str, str, float]]:
    """Kind, count and share of the whole of each kind of parameter."""
    whole = sum(count for _, count in parameters)
    return [(kind, format_count(count), count / whole) for kind, count in parameters]


def further(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def of_kind(entries: list[Entry], kind: str) -> list[Entry]:
    """The entries of one kind."""
    return [e for e in entries if e["kind"] == kind]


def total(entries: list[Entry], key: str) -> float:
    """Sum of a number over the entries that have it."""
    return float(np.nansum(column(entries, key)))


def evaluations(entries: list[Entry], *, blocked: bool) -> list[Entry]:
    """Validations that came out with a loss, with memories ``blocked`` or not."""
    return [e for e in of_kind(entries, "eval") if e.get("loss") is not None and bool(e.get("blocked")) is blocked]
