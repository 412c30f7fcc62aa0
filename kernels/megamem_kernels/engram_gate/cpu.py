"""The Engram gate on the CPU: one pass over each row forward, two (the second from cache) backward."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import float32
from torch import Tensor

from megamem_kernels.elements import elements, load, store
from megamem_kernels.engram_gate.reference import MIN_SCORE
from megamem_kernels.jit import njit
from megamem_kernels.parallel import for_ranges

BLOCK_ROWS = 64
"""Rows whose share of the weight gradient is summed first, whatever the number of threads."""
_GRAIN = 1 << 15  # elements worth a thread
_MIN_SCORE, _ZERO, _HALF, _ONE = np.float32(MIN_SCORE), np.float32(0), np.float32(0.5), np.float32(1)

# Sums over a row are re-associated into vector lanes: their order depends on the width and the processor alone.
_options = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}}


def forward(
    hidden: Tensor, key: Tensor, value: Tensor, weight: Tensor, *, epsilon: float, sqrt_gate: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated values, gates and what the backward pass needs.

    Args:
        hidden: ``[n, h]`` fp32 or bf16, contiguous; ``key`` and ``value`` alike.
        weight: ``[h]`` fp32, the product of both norms' scales.
        epsilon: Added to mean squares.
        sqrt_gate: Whether the score is replaced by its signed square root.
        scale: Factor of the score.

    Returns:
        Gated values ``[n, h]`` in the dtype of ``hidden``, gates ``[n, 1]`` fp32, and ``[n, 3]`` fp32: inverse root mean
        squares of ``hidden`` and ``key``, and the score before its square root.
    """
    count, width = hidden.shape
    gated, gate, rows = torch.empty_like(value), torch.empty(count, 1), torch.empty(count, 3)
    arrays = [elements(tensor) for tensor in (hidden, key, value, weight, gated, gate, rows)]

    def run(low: int, high: int) -> None:
        _forward(low, high, *arrays, np.float32(epsilon), sqrt_gate, np.float32(scale))

    for_ranges(run, count, grain=-(-_GRAIN // width))
    return gated, gate, rows


def backward(
    upstream: Tensor,
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    gate: Tensor,
    rows: Tensor,
    *,
    sqrt_gate: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``hidden``, ``key``, ``value`` (their dtype) and ``weight`` (fp32).

    ``upstream`` is the gradient of the gated values ``[n, h]`` in their dtype, contiguous; the rest as :func:`forward`
    took and gave them.
    """
    count, width = hidden.shape
    gradients = [torch.empty_like(tensor) for tensor in (hidden, key, value)]
    partial = np.zeros((-(-count // BLOCK_ROWS), width), np.float32)
    inputs = [elements(tensor) for tensor in (upstream, hidden, key, value, weight, gate, rows)]
    outputs = [elements(tensor) for tensor in gradients]

    def run(low: int, high: int) -> None:
        _backward(low, high, *inputs, sqrt_gate, np.float32(scale), *outputs, partial)

    for_ranges(run, len(partial), grain=-(-_GRAIN // (width * BLOCK_ROWS)))
    return gradients[0], gradients[1], gradients[2], torch.from_numpy(partial.sum(axis=0))


# Loops over a row are functions of their own: LLVM vectorises them well only apart from the loop over rows.
@njit(**_options)
def _sums(hidden: np.ndarray, key: np.ndarray, weight: np.ndarray) -> tuple[np.float32, np.float32, np.float32]:
    hidden_square, key_square, product = _ZERO, _ZERO, _ZERO
    for j in range(len(weight)):
        h, k = load(hidden[j]), load(key[j])
        hidden_square += h * h
        key_square += k * k
        product += h * k * weight[j]
    return hidden_square, key_square, product


@njit(**_options)
def _scale(x: np.ndarray, factor: np.float32, out: np.ndarray) -> None:
    for j in range(len(x)):
        store(out, j, factor * load(x[j]))


@njit(**_options)
def _dot(x: np.ndarray, y: np.ndarray) -> np.float32:
    total = _ZERO
    for j in range(len(x)):
        total += load(x[j]) * load(y[j])
    return total


@njit(**_options)
def _backward_row(
    hidden: np.ndarray,
    key: np.ndarray,
    weight: np.ndarray,
    d_product: np.float32,
    shrink_hidden: np.float32,
    shrink_key: np.float32,
    d_hidden: np.ndarray,
    d_key: np.ndarray,
    d_weight: np.ndarray,
) -> None:
    for j in range(len(weight)):
        h, k, w = load(hidden[j]), load(key[j]), weight[j]
        store(d_hidden, j, d_product * k * w - shrink_hidden * h)
        store(d_key, j, d_product * h * w - shrink_key * k)
        d_weight[j] += d_product * h * k


@njit(**_options)
def _forward(
    low: int,
    high: int,
    hidden: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    weight: np.ndarray,
    gated: np.ndarray,
    gate: np.ndarray,
    rows: np.ndarray,
    epsilon: np.float32,
    sqrt_gate: bool,
    scale: np.float32,
) -> None:
    mean = _ONE / float32(len(weight))
    for i in range(low, high):
        hidden_square, key_square, product = _sums(hidden[i], key[i], weight)
        inverse_hidden = _ONE / math.sqrt(hidden_square * mean + epsilon)
        inverse_key = _ONE / math.sqrt(key_square * mean + epsilon)
        score = product * inverse_hidden * inverse_key * scale
        rows[i, 0], rows[i, 1], rows[i, 2] = inverse_hidden, inverse_key, score
        if sqrt_gate and score != _ZERO:
            score = math.copysign(math.sqrt(max(abs(score), _MIN_SCORE)), score)
        gate[i, 0] = _ONE / (_ONE + math.exp(-score))
        _scale(value[i], gate[i, 0], gated[i])


@njit(**_options)
def _backward(
    low: int,
    high: int,
    upstream: np.ndarray,
    hidden: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    weight: np.ndarray,
    gate: np.ndarray,
    rows: np.ndarray,
    sqrt_gate: bool,
    scale: np.float32,
    d_hidden: np.ndarray,
    d_key: np.ndarray,
    d_value: np.ndarray,
    partial: np.ndarray,
) -> None:
    mean = _ONE / float32(len(weight))
    for block in range(low, high):
        for i in range(block * BLOCK_ROWS, min(len(gate), (block + 1) * BLOCK_ROWS)):
            inverse_hidden, inverse_key, score, g = rows[i, 0], rows[i, 1], rows[i, 2], gate[i, 0]
            d_score = _dot(upstream[i], value[i]) * g * (_ONE - g)
            if sqrt_gate:
                d_score = d_score * _HALF / math.sqrt(abs(score)) if abs(score) >= _MIN_SCORE else _ZERO
            # score = product * inverse_hidden * inverse_key * scale, and d inverse / d x = -x * inverse**3 / width
            d_product = d_score * inverse_hidden * inverse_key * scale
            shrink_hidden = d_score * score * inverse_hidden * inverse_hidden * mean
            shrink_key = d_score * score * inverse_key * inverse_key * mean
            _backward_row(
                hidden[i], key[i], weight, d_product, shrink_hidden, shrink_key, d_hidden[i], d_key[i], partial[block]
            )
            _scale(upstream[i], g, d_value[i])
