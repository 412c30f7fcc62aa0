"""The memory's part of a report beside its charts: gates over a text sample, and how much of the tables was used."""

from __future__ import annotations

from typing import Any

import numpy as np

from megamem.errors import DataError
from megamem.observe.charts import COLORS, Chart, Mark, Series, chart
from megamem.observe.journal import Entry
from megamem.observe.report_numbers import of_kind


def gate_sections(entries: list[Entry]) -> dict[str, Any]:
    """The last gate measurement: per layer, every token with its gate and the gate's place in the layer's own range."""
    measured = of_kind(entries, "gates")
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


def table_usage(entries: list[Entry]) -> dict[str, Any]:
    """The last measured share of touched rows by table, and the step that it was measured after; empty if there is none."""
    measured = [e for e in of_kind(entries, "tables") if e.get("usage")]
    return {"step": measured[-1]["step"], "tables": measured[-1]["usage"]} if measured else {}


def usage_chart(entries: list[Entry], marks: list[Mark]) -> Chart:
    """Different rows that were read, over the steps, as shares of each stream's table. Counting begins anew at a resume."""
    measured = of_kind(entries, "access")
    names = sorted(name for name, one in measured[-1]["streams"].items() if one["lookups"]) if measured else []
    x = np.array([entry["step"] for entry in measured], dtype=np.float64)
    series = []
    for number, name in enumerate(names):
        streams = [entry["streams"].get(name) for entry in measured]
        y = [100 * one["distinct_rows"] / one["rows"] if one and one["rows"] else np.nan for one in streams]
        series.append(Series(name, x, np.array(y), number % COLORS, "points"))
    return chart(
        "Different rows read since the last start (% of the table)",
        series,
        wide=True,
        marks=marks,
        from_zero=True,
        caption="Read by the first rank: the rows of a table that it has asked for at least once. A curve that flattens has "
        "met most of what its data will ever ask for.",
    )
