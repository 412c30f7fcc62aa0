"""Line charts as inline SVG. Colours come from the style sheet of the page, so charts follow its light and dark form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    """``[n]`` steps, or whatever the chart goes over; ascending."""
    y: np.ndarray
    """``[n]`` values; not finite where there is none."""
    color: int = 0
    """Number of a colour of the style sheet, from 0 to 5."""
    style: Literal["line", "raw", "points"] = "line"
    """``raw``: faint, behind its smoothed form. ``points``: a line with a dot at each value."""


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
    marks: Sequence[int] = (),
    from_zero: bool = False,
    log_x: bool = False,
    x_name: str = "step",
) -> Markup:
    """An ``<svg>`` of lines over steps, empty if no series has a finite value.

    ``size``: width and height, which the page may scale. ``marks``: steps that get a dashed vertical line (resumes).
    ``from_zero``: the vertical axis starts at zero; otherwise it is logarithmic where positive values span more than two
    decades. ``log_x``: the horizontal axis is logarithmic. ``x_name``: what it counts, for the dots.
    """
    shown = [s for s in series if np.isfinite(s.y).any()]
    if not shown:
        return Markup("")
    width, height = size
    values = np.concatenate([s.y[np.isfinite(s.y)] for s in shown])
    log_y = bool(values.min() > 0 and values.max() > 100 * values.min() and not from_zero)
    margins = (0.0 if from_zero else 0.05, 0.05)
    low = 0.0 if from_zero else values.min()
    y_axis = _Axis.over(low, values.max(), height - _BOTTOM, _TOP, log=log_y, margins=margins)
    ends = min(s.x[0] for s in shown), max(s.x[-1] for s in shown)
    x_axis = _Axis.over(*ends, _LEFT, width - _RIGHT, log=log_x)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in y_axis.ticks(5):
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">{_label(tick)}</text>')
    for tick in x_axis.ticks(8, integer=True):
        parts.append(f'<text class="tick middle" x="{x_axis.place(tick):.1f}" y="{height - 6}">{_label(tick)}</text>')
    for step in marks:
        if ends[0] <= step <= ends[1]:
            x = x_axis.place(step)
            line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"'
            parts.append(f'<line class="mark" {line}><title>resumed at step {step}</title></line>')
    for s in shown:
        x, y = thin(s.x, s.y)
        across, down = x_axis.place(x), y_axis.place(y)
        parts.append(f'<path class="line c{s.color} {s.style}" d="{_path(across, down)}"/>')
        if s.style == "points":
            parts += [
                f'<circle class="c{s.color}" cx="{across[i]:.1f}" cy="{down[i]:.1f}" r="3.5">'
                f"<title>{escape(s.name)}: {y[i]:,.{0 if y[i] >= 1000 else 4}f} at {x_name} {x[i]:,.0f}</title></circle>"
                for i in np.flatnonzero(np.isfinite(y))
            ]
    return Markup("".join([*parts, "</svg>"]))


def chart(title: str, series: Sequence[Series], *, wide: bool = False, caption: str = "", **options: Any) -> Chart:
    """A figure with one line chart; ``options`` are those of :func:`line_chart`."""
    svg = line_chart(title, series, size=(1080, 320) if wide else (540, 220), **options)
    return Chart(title, svg, series if len(series) > 1 else (), wide, caption)


def column(entries: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One key of all journal entries as float64, NaN where it is absent or null."""
    values = (entry.get(key) for entry in entries)
    return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)


def lines(steps: Sequence[Mapping[str, Any]], keys: Mapping[str, str], scale: float = 1.0) -> list[Series]:
    """Values over steps of journal entries, by the names in ``keys``; those never measured are left out."""
    x = column(steps, "step")
    series = [Series(name, x, column(steps, key) * scale, color) for color, (name, key) in enumerate(keys.items())]
    return [s for s in series if np.isfinite(s.y).any()]


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values, or their decimal logarithms, to a range of the picture."""

    low: float
    high: float
    start: float
    """Where ``low`` is in the picture."""
    end: float
    log: bool

    @classmethod
    def over(
        cls, low: float, high: float, start: float, end: float, *, log: bool, margins: tuple[float, float] = (0.0, 0.0)
    ) -> _Axis:
        """The axis from value ``low`` to ``high``, with margins as parts of that range."""
        low, high = (float(np.log10(low)), float(np.log10(high))) if log else (float(low), float(high))
        if high <= low:
            low, high = low - 0.5, high + 0.5
        span = high - low
        return cls(low - margins[0] * span, high + margins[1] * span, start, end, log)

    def place(self, values: Any) -> Any:
        """Where values are in the picture."""
        scaled = np.log10(values) if self.log else np.asarray(values)
        return self.start + (scaled - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int, *, integer: bool = False) -> list[float]:
        """About ``count`` round values on the axis."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.log:
            low, high = 10**self.low * (1 - 1e-9), 10**self.high * (1 + 1e-9)
            values = LogLocator(numticks=count + 1).tick_values(low, high)
        else:
            low, high = self.low, self.high
            values = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(low, high)
        return [float(value) for value in values if low <= value <= high]


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


def _label(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
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
