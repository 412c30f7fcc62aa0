"""Charts over the steps of a run: losses, rates, norms, speed, where the time goes, memory."""

from __future__ import annotations

import numpy as np

from megamem.observe.charts import COLORS, Chart, Mark, Series, chart, column, lines, smooth
from megamem.observe.journal import Entry
from megamem.observe.memory_charts import traffic_charts
from megamem.observe.report_numbers import PHASE, evaluations, of_kind

_ORDER = (
    "forward", "backward", "pipeline_wait", "dense_reduce", "dense_step", "plan", "fetch_wait", "exchange", "row_update",
    "data", "checkpoint", "evaluate", "control", "other",
)  # fmt: skip


def step_charts(entries: list[Entry], marks: list[Mark]) -> list[Chart]:
    """What there is to show over the steps. The loss has all ``marks``, the others resumes and trouble alone."""
    steps = of_kind(entries, "step")
    few = [mark for mark in marks if mark.kind != "skip"]
    validation = [
        Series(name, column(group, "step"), column(group, "loss"), color, "points")
        for name, color, group in (
            ("validation", 1, evaluations(entries, blocked=False)),
            ("validation, memory blocked", 2, evaluations(entries, blocked=True)),
        )
        if group
    ]
    times = {"whole step": "step_seconds", "waiting for tables": "stall_seconds", "fetching rows": "fetch_seconds"}
    saving = PHASE + "checkpoint" if any(PHASE + "checkpoint" in step for step in steps) else "checkpoint_seconds"
    stalls = {
        "waiting for tables": "stall_seconds",
        "saving a checkpoint": saving,
        "evaluating": PHASE + "evaluate",
        "waiting for other stages": PHASE + "pipeline_wait",
    }
    figures = [
        ("Auxiliary loss", raw_and_smooth("auxiliary loss", steps, "aux_loss"), False),
        ("Learning rate", lines(steps, {"learning rate": "lr"}), True),
        ("Gradient norm", lines(steps, {"all parameters": "grad_norm", "tables": "grad_norm_tables"}), False),
        ("Tokens per second", raw_and_smooth("tokens per second", steps, "tokens_per_second"), True),
        ("Seconds per step", lines(steps, times), True),
        ("Stalls (seconds)", lines(steps, stalls), True),
        ("Memory (GiB)", lines(steps, {"memory": "memory_bytes"}, scale=2.0**-30), True),
    ]
    charts = [
        chart("Loss", [*raw_and_smooth("training", steps, "loss"), *validation], wide=True, marks=marks),
        chart("Where the time of a step goes (seconds)", phase_series(steps), wide=True, marks=few),
        *(chart(title, series, marks=few, from_zero=from_zero) for title, series, from_zero in figures),
        *traffic_charts(steps, few),
    ]
    return [one for one in charts if one.svg]


def phase_series(steps: list[Entry]) -> list[Series]:
    """Seconds per phase and step, as areas; the smallest are one where there are more phases than colours."""
    names = {key.removeprefix(PHASE) for step in steps for key in step if key.startswith(PHASE)}
    x = column(steps, "step")
    seconds = {name: np.nan_to_num(column(steps, PHASE + name)) for name in names}
    names = {name for name in names if seconds[name].sum() > 0}
    kept = set(sorted(names - {"other"}, key=lambda name: -seconds[name].sum())[: COLORS - 1])
    rest = names - kept
    order = sorted(kept, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    series = [Series(name.replace("_", " "), x, seconds[name], i, "area") for i, name in enumerate(order)]
    if rest:
        series.append(Series("other", x, np.sum([seconds[name] for name in rest], axis=0), len(order), "area"))
    return series


def raw_and_smooth(name: str, steps: list[Entry], key: str) -> list[Series]:
    """A noisy line behind its mean over about a fiftieth of the run; short runs have the line alone."""
    x, y = column(steps, "step"), column(steps, key)
    if np.isfinite(y).sum() < 30:
        return [Series(name, x, y)] if np.isfinite(y).any() else []
    return [Series(f"{name}, each step", x, y, 0, "raw"), Series(f"{name}, smoothed", x, smooth(y, len(y) / 100))]
