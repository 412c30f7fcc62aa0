"""Sums of rows that share a segment, on the CPU: a stable counting sort, then each segment added up by one thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megamem_kernels.elements import load
from megamem_kernels.jit import njit
from megamem_kernels.parallel import for_ranges
from megamem_kernels.prefetch import prefetch_row

_GRAIN = 1 << 15  # elements worth a thread
_AHEAD = 16  # occurrences
_ZERO = np.float32(0)


class Segments:
    """Occurrences ``0, 1, ..., n - 1`` grouped by segment, ascending within each.

    ``order[offsets[k] : offsets[k + 1]]`` are those of segment ``k``.
    """

    def __init__(self, segment: np.ndarray, segments: int) -> None:
        """Sort ``segment`` ``[n]`` int64.

        Raises:
            ValueError: one is not in ``[0, segments)``.
        """
        self.offsets = np.empty(segments + 1, np.int64)
        self.order = np.empty(len(segment), np.int64)
        bad = _group(segment, self.offsets, self.order)
        if bad >= 0:
            raise ValueError(f"segment[{bad}] is {segment[bad]}, not in [0, {segments})")

    def for_ranges(self, function: Callable[[int, int], None], width: int) -> None:
        """Call ``function(low, high)`` on ranges of segments that cover all, each about as much work as the others.

        Work is counted in rows of ``width`` elements, one for each occurrence and one for each segment.
        """

        def run(low: int, high: int) -> None:
            function(_first(self.offsets, low), _first(self.offsets, high))

        for_ranges(run, len(self.order) + len(self.offsets) - 1, grain=max(1, _GRAIN // max(1, width)))


@njit(nogil=True, cache=True)
def _group(segment: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> int:
    """Fill ``offsets`` and ``order``; the first place with a segment out of range, or -1."""
    segments = len(offsets) - 1
    offsets[:] = 0
    for i in range(len(segment)):
        k = segment[i]
        if k < 0 or k >= segments:
            return i
        offsets[k + 1] += 1
    for k in range(segments):
        offsets[k + 1] += offsets[k]
    free = offsets[:segments].copy()
    for i in range(len(segment)):
        k = segment[i]
        order[free[k]] = i
        free[k] += 1
    return -1


@njit(nogil=True, cache=True)
def _first(offsets: np.ndarray, work: int) -> int:
    """The first segment before which at least ``work`` occurrences and segments lie."""
    low, high = 0, len(offsets) - 1
    while low < high:
        middle = (low + high) // 2
        if offsets[middle] + middle < work:
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True, error_model="numpy")
def _sum(
    low: int,
    high: int,
    values: np.ndarray,
    offsets: np.ndarray,
    order: np.ndarray,
    accumulate: bool,
    out: np.ndarray,
) -> None:
    last = offsets[high] - 1
    for k in range(low, high):
        total = out[k]
        if not accumulate:
            total[:] = _ZERO
        for p in range(offsets[k], offsets[k + 1]):
            prefetch_row(values, order[min(p + _AHEAD, last)])
            row = values[order[p]]
            for e in range(len(total)):
                total[e] += load(row[e])


def segment_sum(values: np.ndarray, segment: np.ndarray, out: np.ndarray, accumulate: bool) -> None:
    """See the op; arrays as :func:`megamem_kernels.elements.elements` gives them."""
    grouped = Segments(segment, len(out))
    grouped.for_ranges(
        lambda low, high: _sum(low, high, values, grouped.offsets, grouped.order, accumulate, out), out.shape[1]
    )
