"""The Engram convolution on the CPU. Rows are (position, sequence) pairs in that order."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import float32
from torch import Tensor

from megamem_kernels.elements import elements, load, sigmoid, store
from megamem_kernels.jit import njit
from megamem_kernels.parallel import for_ranges

BLOCK_ROWS = 64
"""Rows whose share of the weight gradient is summed first, whatever the number of threads."""
_GRAIN = 1 << 15  # elements worth a thread
_ZERO, _ONE = np.float32(0), np.float32(1)

_options = {"nogil": True, "cache": True, "error_model": "numpy"}
# Sums over a row are re-associated into vector lanes: their order depends on the width and the processor alone.
_fast = {"reassoc", "contract"}


def forward(
    gated: Tensor, documents: Tensor, taps: Tensor, *, first: int, stride: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Outputs of the rows from ``first``, and the inverse root mean squares of all.

    Args:
        gated: ``[rows, h]`` fp32 or bf16, contiguous.
        documents: ``[rows]``, any integer dtype.
        taps: ``[taps, h]`` fp32, factors of the normed rows; tap ``j`` reads ``stride * (taps - 1 - j)`` rows back.
        first: Rows before it are only read.
        stride: Rows between taps.
        epsilon: Added to mean squares.

    Returns:
        ``[rows - first, h]`` in the dtype of ``gated``, and ``[rows]`` fp32.
    """
    rows, width = gated.shape
    output, inverse = gated.new_empty(rows - first, width), torch.empty(rows)
    x, inverses, out = elements(gated), inverse.numpy(), elements(output)
    ids, factors = documents.to(torch.int64).numpy(), elements(taps)
    grain = -(-_GRAIN // width)
    for_ranges(lambda low, high: _inverse_rms(low, high, x, np.float32(epsilon), inverses), rows, grain=grain)
    for_ranges(
        lambda low, high: _forward(low, high, x, inverses, ids, factors, first, stride, out), rows - first, grain=grain
    )
    return output, inverse


def backward(
    upstream: Tensor, gated: Tensor, documents: Tensor, taps: Tensor, inverse: Tensor, *, first: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``gated`` (its dtype) and ``taps`` (fp32).

    ``upstream`` is the gradient of the outputs ``[rows - first, h]`` in their dtype, contiguous; the rest as
    :func:`forward` took and gave them.
    """
    (rows, width), count = gated.shape, upstream.shape[0]
    gradient, d_sum = torch.empty_like(gated), torch.empty(count, width).numpy()
    partial = np.zeros((-(-count // BLOCK_ROWS), *taps.shape), np.float32)
    up, x, factors, inverses, out = (elements(tensor) for tensor in (upstream, gated, taps, inverse, gradient))
    ids = documents.to(torch.int64).numpy()
    for_ranges(
        lambda low, high: _backward_taps(low, high, up, x, inverses, ids, factors, first, stride, d_sum, partial),
        len(partial),
        grain=-(-_GRAIN // (width * BLOCK_ROWS)),
    )
    for_ranges(
        lambda low, high: _backward_rows(low, high, up, d_sum, x, inverses, ids, factors, first, stride, out),
        rows,
        grain=-(-_GRAIN // width),
    )
    return gradient, torch.from_numpy(partial.sum(axis=0))


# Loops over a row are functions of their own: LLVM vectorises them well only apart from the loops over rows and taps.
@njit(fastmath=_fast, **_options)
def _square(x: np.ndarray) -> np.float32:
    total = _ZERO
    for c in range(len(x)):
        value = load(x[c])
        total += value * value
    return total


@njit(fastmath=_fast, **_options)
def _dot(a: np.ndarray, x: np.ndarray) -> np.float32:
    total = _ZERO
    for c in range(len(x)):
        total += a[c] * load(x[c])
    return total


@njit(fastmath=_fast, **_options)
def _add_product(out: np.ndarray, a: np.ndarray, x: np.ndarray, factor: np.float32) -> None:
    for c in range(len(out)):
        out[c] += a[c] * (load(x[c]) * factor)


@njit(**_options)
def _silu(total: np.ndarray, residual: np.ndarray, out: np.ndarray) -> None:
    for c in range(len(out)):
        store(out, c, total[c] * sigmoid(total[c]) + load(residual[c]))


@njit(**_options)
def _silu_backward(total: np.ndarray, upstream: np.ndarray, out: np.ndarray) -> None:
    for c in range(len(out)):
        s = sigmoid(total[c])
        out[c] = load(upstream[c]) * (s + total[c] * s * (_ONE - s))


@njit(fastmath=_fast, **_options)
def _norm_backward(
    d_normed: np.ndarray, x: np.ndarray, inverse: np.float32, residual: np.ndarray, out: np.ndarray
) -> None:
    """``residual``: gradient that passes the norm by; no elements for none."""
    shrink = _dot(d_normed, x) * inverse * inverse * inverse / float32(len(x))
    if len(residual):
        for c in range(len(x)):
            store(out, c, d_normed[c] * inverse - shrink * load(x[c]) + load(residual[c]))
    else:
        for c in range(len(x)):
            store(out, c, d_normed[c] * inverse - shrink * load(x[c]))


@njit(**_options)
def _inverse_rms(low: int, high: int, x: np.ndarray, epsilon: np.float32, inverse: np.ndarray) -> None:
    for row in range(low, high):
        inverse[row] = _ONE / math.sqrt(_square(x[row]) / float32(x.shape[1]) + epsilon)


@njit(**_options)
def _convolve(
    row: int, x: np.ndarray, inverse: np.ndarray, documents: np.ndarray, taps: np.ndarray, stride: int, out: np.ndarray
) -> None:
    """The convolution's output at one row into ``out`` ``[h]``."""
    out[:] = _ZERO
    for tap in range(len(taps)):
        source = row - stride * (len(taps) - 1 - tap)
        if source >= 0 and documents[source] == documents[row]:
            _add_product(out, taps[tap], x[source], inverse[source])


@njit(**_options)
def _forward(
    low: int,
    high: int,
    x: np.ndarray,
    inverse: np.ndarray,
    documents: np.ndarray,
    taps: np.ndarray,
    first: int,
    stride: int,
    output: np.ndarray,
) -> None:
    total = np.empty(x.shape[1], np.float32)
    for i in range(low, high):
        _convolve(first + i, x, inverse, documents, taps, stride, total)
        _silu(total, x[first + i], output[i])


@njit(**_options)
def _backward_taps(
    low: int,
    high: int,
    upstream: np.ndarray,
    x: np.ndarray,
    inverse: np.ndarray,
    documents: np.ndarray,
    taps: np.ndarray,
    first: int,
    stride: int,
    d_sum: np.ndarray,
    partial: np.ndarray,
) -> None:
    """Gradients of the convolution's outputs, and each block's share of the taps' gradient."""
    total = np.empty(x.shape[1], np.float32)
    for block in range(low, high):
        for i in range(block * BLOCK_ROWS, min(len(d_sum), (block + 1) * BLOCK_ROWS)):
            row = first + i
            _convolve(row, x, inverse, documents, taps, stride, total)
            _silu_backward(total, upstream[i], d_sum[i])
            for tap in range(len(taps)):
                source = row - stride * (len(taps) - 1 - tap)
                if source >= 0 and documents[source] == documents[row]:
                    _add_product(partial[block, tap], d_sum[i], x[source], inverse[source])


@njit(**_options)
def _backward_rows(
    low: int,
    high: int,
    upstream: np.ndarray,
    d_sum: np.ndarray,
    x: np.ndarray,
    inverse: np.ndarray,
    documents: np.ndarray,
    taps: np.ndarray,
    first: int,
    stride: int,
    gradient: np.ndarray,
) -> None:
    """Gradients of the rows, each of which gathers from the outputs that saw it."""
    rows, width = x.shape
    d_normed = np.empty(width, np.float32)
    for row in range(low, high):
        d_normed[:] = _ZERO
        for tap in range(len(taps)):
            target = row + stride * (len(taps) - 1 - tap)
            if first <= target < rows and documents[target] == documents[row]:
                _add_product(d_normed, taps[tap], d_sum[target - first], _ONE)
        residual = upstream[row - first] if row >= first else upstream[0, :0]
        _norm_backward(d_normed, x[row], inverse[row], residual, gradient[row])
