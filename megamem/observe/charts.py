"""Line charts as inline SVG. Colours come from the style sheet of the page, so charts follow its light and dark form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from markupsafe import Markup, escape

from megamem.observe.chart_axes import Axis, label

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
_MAX_POINTS = 1200
_STRIPS = 48  # vertical strips that tell their values when pointed at
_BINS = 180  # stretches of an area chart
COLORS = 10
"""Colours of the style sheet."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    x: np.ndarray
    """``[n]`` steps, or whatever the chart goes over; ascending."""
    y: np.ndarray
    """``[n]`` values; not finite where there is none."""
    color: int = 0
    """Number of a colour of the style sheet, from 0 to 9."""
    style: Literal["line", "raw", "points", "area"] = "line"
    """``raw``: faint, behind its smoothed form. ``points``: a line with a dot at each value. ``area``: filled."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A dashed vertical line where something happened."""

    step: int
    kind: Literal["resume", "skip", "trouble"]
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure of a report."""

    title: str
    svg: Markup
    """Empty where there is nothing to show."""
    legend: Sequence[Series] = ()
    """The lines, where there are several."""
    wide: bool = False
    caption: str = ""
    """How to read it, where that is not plain."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    size: tuple[int, int] = (540, 220),
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    log_x: bool = False,
    x_name: str = "step",
) -> Markup:
    """An ``<svg>`` of lines over steps, empty if no series has a finite value.

    ``size``: width and height, which the page may scale. ``from_zero``: the vertical axis starts at zero; otherwise it is
    logarithmic where positive values span more than two decades. ``log_x``: the horizontal axis is logarithmic. ``x_name``:
    what it counts, for dots and strips.
    """
    shown = [s for s in series if np.isfinite(s.y).any()]
    if not shown:
        return Markup("")
    values = np.concatenate([s.y[np.isfinite(s.y)] for s in shown])
    log_y = bool(values.min() > 0 and values.max() > 100 * values.min() and not from_zero)
    margins = (0.0 if from_zero else 0.05, 0.05)
    low = 0.0 if from_zero else values.min()
    y_axis = Axis.over(low, values.max(), size[1] - _BOTTOM, _TOP, log=log_y, margins=margins)
    ends = min(s.x[0] for s in shown), max(s.x[-1] for s in shown)
    x_axis = Axis.over(*ends, _LEFT, size[0] - _RIGHT, log=log_x)
    parts = [*_frame(title, size, x_axis, y_axis), *_marks(marks, ends, x_axis, size[1])]
    for s in shown:
        x, y = thin(s.x, s.y)
        across, down = x_axis.place(x), y_axis.place(y)
        parts.append(f'<path class="line c{s.color} {s.style}" d="{_path(across, down)}"/>')
    parts += _strips([s for s in shown if s.style != "raw"], x_axis, size, x_name)
    for s in shown:
        if s.style == "points":
            across, down = x_axis.place(s.x), y_axis.place(s.y)
            parts += [
                f'<circle class="c{s.color}" cx="{across[i]:.1f}" cy="{down[i]:.1f}" r="3.5">'
                f"<title>{escape(s.name)}: {_number(s.y[i])} at {escape(x_name)} {s.x[i]:,.0f}</title></circle>"
                for i in np.flatnonzero(np.isfinite(s.y))
            ]
    return Markup("".join([*parts, "</svg>"]))


def area_chart(
    title: str, series: Sequence[Series], *, size: tuple[int, int] = (540, 220), marks: Sequence[Mark] = ()
) -> Markup:
    """An ``<svg>`` of areas on top of each other, the first series lowest, averaged over stretches of the run.

    All series have the same ``x``; a missing value counts as zero.
    """
    if not series or not len(series[0].x):
        return Markup("")
    stretches = np.array_split(np.arange(len(series[0].x)), min(_BINS, len(series[0].x)))
    x = np.array([series[0].x[part].mean() for part in stretches])
    heights = np.array([[np.nan_to_num(s.y[part]).mean() for part in stretches] for s in series])
    tops = np.cumsum(heights, axis=0)
    y_axis = Axis.over(0.0, tops.max(), size[1] - _BOTTOM, _TOP, log=False, margins=(0.0, 0.05))
    x_axis = Axis.over(x[0], x[-1], _LEFT, size[0] - _RIGHT, log=False)
    parts = _frame(title, size, x_axis, y_axis)
    across, floors = x_axis.place(x), np.vstack([np.zeros(len(x)), tops[:-1]])
    if len(x) == 1:
        across, tops, floors = np.array([_LEFT, size[0] - _RIGHT]), np.repeat(tops, 2, 1), np.repeat(floors, 2, 1)
    for s, floor, top in zip(series, floors, tops, strict=True):
        outline = _path(np.r_[across, across[::-1]], np.r_[y_axis.place(top), y_axis.place(floor)[::-1]])
        parts.append(f'<path class="area c{s.color}" d="{outline}Z"/>')
    parts += _marks(marks, (x[0], x[-1]), x_axis, size[1])
    binned = [Series(s.name, x, height) for s, height in zip(series, heights, strict=True)]
    parts += _strips(binned[::-1], x_axis, size, "step")
    return Markup("".join([*parts, "</svg>"]))


def _frame(title: str, size: tuple[int, int], x_axis: Axis, y_axis: Axis) -> list[str]:
    width, height = size
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in y_axis.ticks(5):
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">{label(tick)}</text>')
    for tick in x_axis.ticks(8, integer=True):
        parts.append(f'<text class="tick middle" x="{x_axis.place(tick):.1f}" y="{height - 6}">{label(tick)}</text>')
    return parts


def _marks(marks: Sequence[Mark], ends: tuple[float, float], x_axis: Axis, height: int) -> list[str]:
    parts = []
    for mark in marks:
        if ends[0] <= mark.step <= ends[1]:
            x = x_axis.place(mark.step)
            line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"'
            parts.append(f'<line class="mark {mark.kind}" {line}><title>{escape(mark.text)}</title></line>')
    return parts


def _strips(series: Sequence[Series], x_axis: Axis, size: tuple[int, int], x_name: str) -> list[str]:
    """Transparent strips over the picture, each with the values nearest to its middle as its tooltip."""
    places = np.unique(np.concatenate([s.x[np.isfinite(s.y)] for s in series])) if series else np.empty(0)
    across = x_axis.place(places)
    left, right = _LEFT, size[0] - _RIGHT
    count = min(_STRIPS, len(places))
    if not count:
        return []
    step, parts = (right - left) / count, []
    for i in range(count):
        inside = np.flatnonzero((across >= left + i * step) & (across <= left + (i + 1) * step))
        if not len(inside):
            continue
        x = places[inside[len(inside) // 2]]
        told = []
        for s in series:
            known = np.flatnonzero(np.isfinite(s.y))
            if not len(known):
                continue
            at = known[np.abs(s.x[known] - x).argmin()]
            if s.style != "points" or places[inside[0]] <= s.x[at] <= places[inside[-1]]:
                told.append(f"{s.name}: {_number(s.y[at])}")
        text = escape("\n".join([f"{x_name} {x:,.6g}", *told]))
        box = f'x="{left + i * step:.0f}" y="{_TOP}" width="{step:.1f}" height="{size[1] - _TOP - _BOTTOM}"'
        parts.append(f'<rect class="strip" {box}><title>{text}</title></rect>')
    return parts


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def chart(title: str, series: Sequence[Series], *, wide: bool = False, caption: str = "", **options: Any) -> Chart:
    """A figure with one chart, of areas or lines; ``options`` are those of :func:`area_chart` or :func:`line_chart`."""
    draw = area_chart if series and series[0].style == "area" else line_chart
    svg = draw(title, series, size=(1080, 320) if wide else (540, 220), **options)
    return Chart(title, svg, series if len(series) > 1 else (), wide, caption)


def column(entries: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One key of all journal entries as float64, NaN where it is absent or null."""
    values = (entry.get(key) for entry in entries)
    return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)


def lines(steps: Sequence[Mapping[str, Any]], keys: Mapping[str, str], scale: float = 1.0) -> list[Series]:
    """Values over steps of journal entries, by the names in ``keys``; those never measured are left out."""
    x = column(steps, "step")
    series = [
        Series(name, x, column(steps, key) * scale, color % COLORS) for color, (name, key) in enumerate(keys.items())
    ]
    return [s for s in series if np.isfinite(s.y).any()]


def smooth(y: np.ndarray, half_life: float) -> np.ndarray:
    """``y`` ``[n]`` averaged with weights that halve every ``half_life`` places to both sides, so the mean does not lag.

    Missing values have no weight.
    """
    known = np.isfinite(y)
    values = np.stack([np.where(known, y, 0.0), known])
    sums = _decaying_sums(values, half_life) + _decaying_sums(values[:, ::-1], half_life)[:, ::-1] - values
    return sums[0] / np.where(sums[1] > 0, sums[1], np.nan)


def _decaying_sums(values: np.ndarray, half_life: float) -> np.ndarray:
    """Running sums ``[k, n]`` along the last axis that forget half of what they hold every ``half_life`` places."""
    decay = 0.5 ** (1 / half_life)
    sums, total = np.empty_like(values), np.zeros(len(values))
    for i in range(values.shape[1]):
        total = decay * total + values[:, i]
        sums[:, i] = total
    return sums


def thin(x: np.ndarray, y: np.ndarray, limit: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` points that look the same: the lowest and highest value of each stretch, so no spike is lost."""
    if len(x) <= limit:
        return x, y
    known = np.flatnonzero(np.isfinite(y))
    stretches = [part for part in np.array_split(known, limit // 2) if len(part)]
    keep = np.unique([part[pick] for part in stretches for pick in (y[part].argmin(), y[part].argmax())])
    return x[keep], y[keep]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Path data with a gap wherever a value is missing."""
    commands, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if np.isfinite(b):
            commands.append(f"{pen}{a:.1f} {b:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(commands)
