"""Optimizer updates of touched rows on the CPU: one pass over each row and its state.

Every function updates rows ``[low, high)`` of an update, whose gradient is ``gradient`` fp32 ``[u, width]``. Scalars are
fp32; ``kept`` is what weight decay leaves of a weight, ``1 - lr * weight_decay``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32

from megamem_kernels.jit import njit
from megamem_kernels.prefetch import prefetch_row
from megamem_kernels.row_update.storage import Stored, close_row, open_row

_AHEAD = 8  # rows
_ONE = np.float32(1)

_options = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_options, fastmath={"reassoc"})
def mean_square(row: np.ndarray) -> np.float32:
    """Mean of the squares of a row; the order of the sum depends on the width and the processor alone."""
    total = float32(0)
    for e in range(len(row)):
        total += row[e] * row[e]
    return total / float32(len(row))


@njit(**_options)
def decay(powers: np.ndarray, gap: int) -> np.float32:
    """``powers[1] ** gap`` in float64, then fp32; looked up where ``powers``, float64 ``beta ** [0, 1, ...]``, reaches."""
    return float32(powers[gap] if gap < len(powers) else powers[1] ** gap)


@njit(**_options)
def add_scaled(low: int, high: int, stored: Stored, delta: np.ndarray, alpha: np.float32, kept: np.float32) -> None:
    """``w = kept w + alpha delta``."""
    count, width = delta.shape
    scratch, words = np.empty(width, np.float32), np.empty((width + 3) // 4, np.uint64)
    for i in range(low, high):
        prefetch_row(stored.rows, stored.slots[min(i + _AHEAD, count - 1)])
        d, w = delta[i], open_row(stored, i, scratch)
        for e in range(width):
            w[e] = kept * w[e] + alpha * d[e]
        close_row(stored, i, w, words)


@njit(**_options)
def rowwise_adagrad(
    low: int,
    high: int,
    stored: Stored,
    slots: np.ndarray,
    accumulator: np.ndarray,
    gradient: np.ndarray,
    lr: np.float32,
    epsilon: np.float32,
    kept: np.float32,
) -> None:
    """``accumulator`` fp32 ``[slots]``."""
    count, width = gradient.shape
    scratch, words = np.empty(width, np.float32), np.empty((width + 3) // 4, np.uint64)
    for i in range(low, high):
        ahead = min(i + _AHEAD, count - 1)
        prefetch_row(stored.rows, stored.slots[ahead])
        prefetch_row(accumulator, slots[ahead])
        g, w = gradient[i], open_row(stored, i, scratch)
        sum_of_squares = accumulator[slots[i]] + mean_square(g)
        accumulator[slots[i]] = sum_of_squares
        rate = lr / (math.sqrt(sum_of_squares) + epsilon)
        for e in range(width):
            w[e] = kept * w[e] - rate * g[e]
        close_row(stored, i, w, words)


@njit(**_options)
def lazy_adam(
    low: int,
    high: int,
    stored: Stored,
    slots: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    last_step: np.ndarray,
    gradient: np.ndarray,
    beta1: np.ndarray,
    beta2: np.ndarray,
    rate: np.float32,
    root: np.float32,
    epsilon: np.float32,
    kept: np.float32,
    step: int,
) -> int:
    """``exp_avg`` fp32 ``[slots, width]``, ``exp_avg_sq`` the same or ``[slots, 1]`` for one second moment per row,
    ``last_step`` int32 ``[slots]``.

    ``rate = lr / (1 - beta1 ** step)``, ``root = 1 / sqrt(1 - beta2 ** step)``; ``beta1`` and ``beta2`` float64 powers.
    Returns the latest last step that is not before ``step``, else -1; such rows are left as they are.
    """
    count, width = gradient.shape
    scratch, words = np.empty(width, np.float32), np.empty((width + 3) // 4, np.uint64)
    new1, new2 = float32(1 - beta1[1]), float32(1 - beta2[1])
    late = -1
    for i in range(low, high):
        ahead = min(i + _AHEAD, count - 1)
        prefetch_row(stored.rows, stored.slots[ahead])
        prefetch_row(exp_avg, slots[ahead])
        prefetch_row(exp_avg_sq, slots[ahead])
        prefetch_row(last_step, slots[ahead])
        slot = slots[i]
        gap = step - last_step[slot]
        if gap < 1:
            late = max(late, step - gap)
            continue
        last_step[slot] = step
        old1, old2 = decay(beta1, gap), decay(beta2, gap)
        g, m, v, w = gradient[i], exp_avg[slot], exp_avg_sq[slot], open_row(stored, i, scratch)
        if len(v) == width:
            for e in range(width):
                m[e] = old1 * m[e] + new1 * g[e]
                v[e] = old2 * v[e] + new2 * (g[e] * g[e])
                w[e] = kept * w[e] - rate * m[e] / (math.sqrt(v[e]) * root + epsilon)
        else:
            v[0] = old2 * v[0] + new2 * mean_square(g)
            row_rate = rate / (math.sqrt(v[0]) * root + epsilon)
            for e in range(width):
                m[e] = old1 * m[e] + new1 * g[e]
                w[e] = kept * w[e] - row_rate * m[e]
        close_row(stored, i, w, words)
    return late


@njit(**_options)
def momentum(
    low: int,
    high: int,
    slots: np.ndarray,
    momentum_buffer: np.ndarray,
    last_step: np.ndarray,
    gradient: np.ndarray,
    beta: np.ndarray,
    step: int,
    out: np.ndarray,
) -> int:
    """Nesterov's momentum to ``out`` fp32 ``[u, width]``; ``beta`` float64 powers. Returns as :func:`lazy_adam`."""
    count, width = gradient.shape
    one, new = float32(beta[1]), float32(1 - beta[1])
    late = -1
    for i in range(low, high):
        ahead = min(i + _AHEAD, count - 1)
        prefetch_row(momentum_buffer, slots[ahead])
        prefetch_row(last_step, slots[ahead])
        slot = slots[i]
        gap = step - last_step[slot]
        if gap < 1:
            late = max(late, step - gap)
            continue
        last_step[slot] = step
        old = decay(beta, gap)
        g, m, o = gradient[i], momentum_buffer[slot], out[i]
        for e in range(width):
            m[e] = old * m[e] + new * g[e]
            o[e] = one * m[e] + new * g[e]
    return late
