"""Line charts as inline SVG. Colours come from the style sheet of the page, so a chart follows its light and dark form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup, escape

from megamem.observe.progress import format_count

_WIDTH, _HEIGHT = 720.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 10.0, 26.0
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


def line_chart(title: str, series: Sequence[Series], *, marks: Sequence[int] = (), from_zero: bool = False) -> Markup:
    """An ``<svg>`` of lines over steps, empty if no series has a finite value.

    The vertical axis is logarithmic where positive values span more than two decades. ``marks``: steps that get a dashed vertical
    line (resumes). ``from_zero``: the linear axis starts at zero.
    """
    finite = [s for s in series if np.isfinite(s.y).any()]
    if not finite:
        return Markup("")
    values = np.concatenate([s.y[np.isfinite(s.y)] for s in finite])
    log = bool(values.min() > 0 and values.max() / values.min() > 100 and not from_zero)
    x_low, x_high = _range(min(s.x[0] for s in finite), max(s.x[-1] for s in finite))
    low, high = float(values.min()), float(values.max())
    if log:
        low, high = np.log10(low), np.log10(high)
    low, high = _range(0.0 if from_zero else low, high)
    if not from_zero:
        low -= 0.05 * (high - low)
    high += 0.05 * (high - low)

    def horizontal(x: np.ndarray) -> np.ndarray:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def vertical(y: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.log10(y) if log else y
        return _HEIGHT - _BOTTOM - (scaled - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title)}">']
    for tick in _ticks(low, high, log):
        y = float(vertical(np.asarray(tick)))
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8:g}" y="{y + 4:.1f}">{_label(tick)}</text>')
    for tick in _ticks(x_low, x_high, False, integer=True):
        x = float(horizontal(np.asarray(tick)))
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{_HEIGHT - 6:g}">{_label(tick)}</text>')
    for step in marks:
        if x_low <= step <= x_high:
            x = float(horizontal(np.asarray(step)))
            parts.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP:g}" y2="{_HEIGHT - _BOTTOM:g}">'
                f"<title>resumed at step {step}</title></line>"
            )
    for s in finite:
        x, y = thin(s.x, s.y)
        parts.append(f'<path class="line c{s.color} {s.style}" d="{_path(horizontal(x), vertical(y))}"/>')
        if s.style == "points":
            parts += [
                f'<circle class="c{s.color}" cx="{cx:.1f}" cy="{cy:.1f}" r="3.5">'
                f"<title>{escape(s.name)}: {value:.4f} at step {step:.0f}</title></circle>"
                for cx, cy, step, value in zip(horizontal(x), vertical(y), x, y, strict=True)
                if np.isfinite(cy)
            ]
    return Markup("".join([*parts, "</svg>"]))


def smooth(y: np.ndarray, half_life: float) -> np.ndarray:
    """Exponential mean of ``y`` ``[n]`` with weights that sum to one from the first value on; missing values are passed over."""
    decay = 0.5 ** (1 / half_life)
    result = np.full(len(y), np.nan)
    total = weight = 0.0
    for i, value in enumerate(y):
        if np.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
            result[i] = total / weight
    return result


def thin(x: np.ndarray, y: np.ndarray, limit: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` points that look the same: the lowest and the highest value of each stretch, so that no spike is lost."""
    if len(x) <= limit:
        return x, y
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    bounds = np.linspace(0, len(x), limit // 2 + 1).astype(int)
    chosen = {i for a, b in zip(bounds, bounds[1:], strict=False) if b > a for i in (a + y[a:b].argmin(), a + y[a:b].argmax())}
    index = np.array(sorted(chosen), dtype=int)
    return x[index], y[index]


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
