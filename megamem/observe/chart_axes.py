"""Axes of charts: where values lie in the picture, and which round ones are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megamem.observe.progress import format_count


@dataclass(frozen=True, slots=True)
class Axis:
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
    ) -> Axis:
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


def label(value: float) -> str:
    """A value of an axis, short enough for its margin."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return format_count(value) if abs(value) >= 1000 else f"{value:.4g}"
