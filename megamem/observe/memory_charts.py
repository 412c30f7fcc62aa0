"""The memory's part of a report: traffic over the steps, and how the run reads its tables (journal kind ``access``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megamem.observe.charts import Chart, Mark, Series, chart, column, lines
from megamem.observe.journal import Entry
from megamem.observe.progress import format_count


def traffic_charts(steps: list[Entry], marks: Sequence[Mark]) -> list[Chart]:
    """Charts of the memory's numbers in journal entries of kind ``step``."""
    seconds = column(steps, "step_seconds")
    waiting = Series(
        "waiting", column(steps, "step"), 100 * column(steps, "stall_seconds") / np.where(seconds > 0, seconds, np.nan)
    )
    ratios = {"unique, of the rows looked up": "unique_ratio", "patched, of the rows fetched": "patch_ratio"}
    exchanged = [s for s in steps if s.get("bytes_received")]  # one process exchanges nothing with itself
    figures: list[tuple[str, list[Series]]] = [
        ("Waiting for tables (% of the step)", [waiting]),
        ("Unique and patched rows (%)", lines(steps, ratios, scale=100)),
        ("Bytes received by the exchange", lines(exchanged, {"bytes per step": "bytes_received"})),
        ("Rows read and written per step, by tier", _by_tier(steps, ("rows_read", "rows_written"))),
        ("MiB read and written per step, by tier", _by_tier(steps, ("bytes_read", "bytes_written"), 2.0**-20)),
        ("Tables and their state (GiB), by tier", _by_tier(steps, ("resident_bytes",), 2.0**-30)),
    ]
    return [chart(title, series, marks=marks, from_zero=True) for title, series in figures]


def _by_tier(steps: list[Entry], kinds: Sequence[str], scale: float = 1.0) -> list[Series]:
    """Values by tier of keys such as ``rows_read/host``, for the ``kinds`` before the stroke."""
    keys = sorted({key for step in steps for key in step if key.partition("/")[0] in kinds})
    names = {}
    for key in keys:
        kind, _, tier = key.partition("/")
        names[f"{tier}, {kind.partition('_')[2]}" if len(kinds) > 1 else tier] = key
    return lines(steps, names, scale)


def access_sections(entries: list[Entry]) -> dict[str, Any]:
    """The last measured access statistics: per stream a title, a line of numbers and charts. Empty if there are none."""
    measured = [e for e in entries if e["kind"] == "access" and any(s["lookups"] for s in e["streams"].values())]
    if not measured:
        return {}
    last = measured[-1]
    streams = [
        {"name": name, "text": _in_numbers(summary), "charts": _access_charts(summary)}
        for name, summary in last["streams"].items()
        if summary["lookups"]
    ]
    return {"step": last["step"], "rank": last["rank"], "streams": streams}


def _in_numbers(summary: Mapping[str, Any]) -> str:
    part = summary["sampled"]
    how = "Every row was followed." if part == 1 else f"Estimated from one row in {round(1 / part)}, chosen by hash."
    return (
        f"{summary['steps']:,} steps made {format_count(summary['lookups'])} lookups and fetched "
        f"{format_count(summary['accesses'])} rows, {format_count(summary['distinct_rows'])} different ones of the "
        f"{format_count(summary['rows'])} in the table. {how}"
    )


def _access_charts(summary: Mapping[str, Any]) -> list[Chart]:
    hot, heat, cache = (
        {key: np.array(values, dtype=np.float64) for key, values in summary[name].items()}
        for name in ("hot_rows", "heat", "hit_rate")
    )
    heat["rows"][heat["rows"] == 0] = np.nan  # has no place on a logarithmic axis
    rates = [
        Series("rows fetched by a step", cache["rows"], 100 * cache["steps"], 0),
        Series("lookups of tokens", cache["rows"], 100 * cache["lookups"], 1),
    ]
    rows, best = summary["rows"], 100 * max(summary["hit_rate"]["steps"])
    small = float(np.interp(0.01 * rows, cache["rows"], 100 * cache["steps"]))
    return [
        chart(
            "Hit rate (%) against the size of a cache (rows)",
            rates,
            wide=True,
            from_zero=True,
            log_x=True,
            x_name="cache rows",
            caption=f"A point (x, y): a cache that keeps the x rows used last would have held y % of what was asked of it. "
            f"Here, 1 % of the table is {format_count(0.01 * rows)} rows and holds {small:.1f} % of the rows that steps fetch; "
            "one smaller than the rows of a step holds nothing for the next, and where the curve is flat, more memory holds "
            f"nothing more. It ends below 100 %, at {best:.1f} % here, since no "
            "cache has a row before its first use. Lookups of tokens are higher: a step fetches a row once, however often "
            "its tokens look it up, and those repeats count as held.",
        ),
        chart(
            "Lookups (%) that go to the hottest rows",
            [Series("lookups", hot["rows"], 100 * hot["share"], 0, "points")],
            from_zero=True,
            log_x=True,
            x_name="hottest rows",
            caption="A point (x, y): y % of all lookups went to the x rows looked up most.",
        ),
        chart(
            "Rows by number of lookups",
            [Series("rows", heat["lookups"], heat["rows"], 0, "points")],
            log_x=True,
            x_name="lookups from",
            caption="A point (x, y): y rows were looked up x times or more, but less than twice as often as that.",
        ),
    ]
