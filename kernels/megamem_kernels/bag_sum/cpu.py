"""Weighted sums of the rows of bags on the CPU; rows and results as :func:`megamem_kernels.elements.elements` gives them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32

from megamem_kernels.elements import load, store
from megamem_kernels.jit import njit
from megamem_kernels.parallel import for_ranges
from megamem_kernels.prefetch import prefetch_row
from megamem_kernels.segment_sum.cpu import Segments

_GRAIN = 1 << 14  # elements worth a thread
_AHEAD = 16  # occurrences
_ZERO = np.float32(0)

_options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


def forward(rows: np.ndarray, index: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Fill ``out`` ``[bags, width]``; ``index`` int64 and ``weights`` fp32 ``[bags, j]``.

    Raises:
        ValueError: an index is out of range.
    """
    bad: list[int] = []
    bags, size = index.shape

    def run(low: int, high: int) -> None:
        bad.append(_forward(low, high, rows, index, weights, out))

    for_ranges(run, bags, grain=max(1, _GRAIN // max(1, size * rows.shape[1])))
    if bad and max(bad) >= 0:
        b, j = divmod(max(bad), size)
        raise ValueError(f"index[{b}, {j}] is {index[b, j]}, not in [0, {len(rows)})")


def backward(
    gradient: np.ndarray,
    rows: np.ndarray,
    index: np.ndarray,
    weights: np.ndarray,
    row_gradient: np.ndarray | None,
    accumulate: bool,
    weight_gradient: np.ndarray | None,
) -> None:
    """Gradients of :func:`forward` where wanted, given that of its result: ``row_gradient`` like ``rows``, added to what it
    holds where ``accumulate``; ``weight_gradient`` fp32 ``[bags, j]``."""
    segments = Segments(index.reshape(-1), len(rows))
    want_rows, want_weights = row_gradient is not None, weight_gradient is not None
    # What is not wanted is not written; the inputs stand in.
    to_rows = rows if row_gradient is None else row_gradient
    to_weights = weights.reshape(-1) if weight_gradient is None else weight_gradient.reshape(-1)
    flat, size = weights.reshape(-1), index.shape[1]

    def run(low: int, high: int) -> None:
        _backward(
            low, high, gradient, rows, flat, size, segments.offsets, segments.order,
            want_rows, accumulate, to_rows, want_weights, to_weights,
        )  # fmt: skip

    segments.for_ranges(run, rows.shape[1])


@njit(**_options, fastmath={"reassoc"})
def _dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    """Inner product; the order of the sum depends on the width and the processor alone."""
    total = float32(0)
    for e in range(len(a)):
        total += load(a[e]) * load(b[e])
    return total


@njit(**_options)
def _forward(low: int, high: int, rows: np.ndarray, index: np.ndarray, weights: np.ndarray, out: np.ndarray) -> int:
    """Returns the last place of a bag in ``[low, high)`` whose index is out of range, or -1."""
    count, width = rows.shape
    places, factors, size = index.reshape(-1), weights.reshape(-1), index.shape[1]
    total, bad = np.empty(width, np.float32), -1
    for b in range(low, high):
        total[:] = _ZERO
        for i in range(b * size, (b + 1) * size):
            if not 0 <= places[i] < count:
                bad = i
                continue
            if i + _AHEAD < high * size:
                prefetch_row(rows, min(max(places[i + _AHEAD], 0), count - 1))
            row, factor = rows[places[i]], factors[i]
            for e in range(width):
                total[e] += factor * load(row[e])
        target = out[b]
        for e in range(width):
            store(target, e, total[e])
    return bad


@njit(**_options)
def _backward(
    low: int,
    high: int,
    gradient: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray,
    size: int,
    offsets: np.ndarray,
    order: np.ndarray,
    want_rows: bool,
    accumulate: bool,
    row_gradient: np.ndarray,
    want_weights: bool,
    weight_gradient: np.ndarray,
) -> None:
    width = rows.shape[1]
    total, last = np.empty(width, np.float32), offsets[high] - 1
    for k in range(low, high):
        begun, target = accumulate, row_gradient[k]
        if accumulate:
            for e in range(width):
                total[e] = load(target[e])
        elif offsets[k] == offsets[k + 1]:
            total[:] = _ZERO
        for p in range(offsets[k], offsets[k + 1]):
            prefetch_row(gradient, order[min(p + _AHEAD, last)] // size)
            i = order[p]
            g, factor = gradient[i // size], weights[i]
            if want_weights:
                weight_gradient[i] = _dot(g, rows[k])
            if begun:
                for e in range(width):
                    total[e] += factor * load(g[e])
            else:
                for e in range(width):
                    total[e] = factor * load(g[e])
                begun = True
        if want_rows:
            for e in range(width):
                store(target, e, total[e])
