"""Line charts as inline SVG. Colours come from the style sheet of the page, so charts follow its light and dark form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup, escape

from megamem.observe.progress import format_count

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
_MAX_POINTS = 1200


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    x: np.ndarray
    """``[n]`` steps, ascending."""
    y: np.ndarray
    """``[n]`` values; not finite where there is none."""
    color: int = 0
    """Number of a colour of the style sheet, from 0 to 2."""
    style: Literal["line", "raw", "points"] = "line"
    """``raw``: faint, behind its smoothed form. ``points``: a line with a dot at each value."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    size: tuple[int, int] = (540, 220),
    marks: Sequence[int] = (),
    from_zero: bool = False,
) -> Markup:
    """An ``<svg>`` of lines over steps, empty if no series has a finite value.

    ``size``: width and height, which the page may scale. ``marks``: steps that get a dashed vertical line (resumes).
    ``from_zero``: the vertical axis starts at zero; otherwise it is logarithmic where positive values span more than two
    decades.
    """
    shown = [s for s in series if np.isfinite(s.y).any()]
    if not shown:
        return Markup("")
    width, height = size
    values = np.concatenate([s.y[np.isfinite(s.y)] for s in shown])
    log = bool(values.min() > 0 and values.max() > 100 * values.min() and not from_zero)
    low, high = np.log10([values.min(), values.max()]) if log else (values.min(), values.max())
    low, high = _range(0.0 if from_zero else low, high)
    low, high = low - (0.0 if from_zero else 0.05 * (high - low)), high + 0.05 * (high - low)
    left, right = _range(min(s.x[0] for s in shown), max(s.x[-1] for s in shown))

    def across(x: np.ndarray | float) -> np.ndarray:
        return _LEFT + (np.asarray(x) - left) / (right - left) * (width - _LEFT - _RIGHT)

    def down(y: np.ndarray | float) -> np.ndarray:
        scaled = np.log10(y) if log else np.asarray(y)
        return height - _BOTTOM - (scaled - low) / (high - low) * (height - _TOP - _BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in _ticks(low, high, log):
        y = float(down(tick))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">{_label(tick)}</text>')
    for tick in _ticks(left, right, log=False, integer=True):
        parts.append(f'<text class="tick middle" x="{across(tick):.1f}" y="{height - 6}">{_label(tick)}</text>')
    for step in marks:
        if left <= step <= right:
            x = float(across(step))
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"'
            parts.append(f'<line class="mark" {ends}><title>resumed at step {step}</title></line>')
    for s in shown:
        steps, heights = thin(s.x, s.y)
        parts.append(f'<path class="line c{s.color} {s.style}" d="{_path(across(steps), down(heights))}"/>')
        if s.style == "points":
            parts += [
                f'<circle class="c{s.color}" cx="{across(step):.1f}" cy="{down(value):.1f}" r="3.5">'
                f"<title>{escape(s.name)}: {value:.4f} at step {step:.0f}</title></circle>"
                for step, value in zip(steps, heights, strict=True)
                if np.isfinite(value)
            ]
    return Markup("".join([*parts, "</svg>"]))


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


def _range(low: float, high: float) -> tuple[float, float]:
    """The same range, widened where it is a single point."""
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(high) + 0.5)


def _ticks(low: float, high: float, log: bool, integer: bool = False) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log:
        ticks = LogLocator(numticks=6).tick_values(10**low, 10**high)
        low, high = 10**low, 10**high
    else:
        ticks = MaxNLocator(nbins=8 if integer else 5, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(low, high)
    return [float(t) for t in ticks if low <= t <= high]


def _label(value: float) -> str:
    return format_count(value) if abs(value) >= 1000 else f"{value:.4g}"


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
