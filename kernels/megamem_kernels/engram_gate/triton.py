"""The Engram gate on CUDA devices: a program per row forward, per block of rows backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem_kernels.engram_gate.reference import MIN_SCORE

BLOCK_ROWS = 16
"""Rows whose share of the weight gradient one program sums."""
_MIN_SCORE = tl.constexpr(MIN_SCORE)


def forward(
    hidden: Tensor, key: Tensor, value: Tensor, weight: Tensor, *, epsilon: float, sqrt_gate: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`megamem_kernels.engram_gate.cpu.forward`."""
    count, width = hidden.shape
    gated = torch.empty_like(value)
    gate, rows = (hidden.new_empty(count, columns, dtype=torch.float32) for columns in (1, 3))
    if count:
        _forward[(count,)](
            hidden,
            key,
            value,
            weight,
            gated,
            gate,
            rows,
            width,
            epsilon,
            scale,
            SQRT_GATE=sqrt_gate,
            **whole_rows(width),
        )
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
    """As :func:`megamem_kernels.engram_gate.cpu.backward`."""
    count, width = hidden.shape
    d_hidden, d_key, d_value = (torch.empty_like(tensor) for tensor in (hidden, key, value))
    partial = hidden.new_empty(triton.cdiv(count, BLOCK_ROWS), width, dtype=torch.float32)
    if count:
        _backward[(len(partial),)](
            upstream,
            hidden,
            key,
            value,
            weight,
            gate,
            rows,
            d_hidden,
            d_key,
            d_value,
            partial,
            count,
            width,
            scale,
            SQRT_GATE=sqrt_gate,
            ROWS=BLOCK_ROWS,
            **whole_rows(width),
        )
    return d_hidden, d_key, d_value, partial.sum(0)


def whole_rows(width: int) -> dict[str, int]:
    """Launch options of a program that holds whole rows."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@triton.jit
def _forward(
    hidden,
    key,
    value,
    weight,
    gated,
    gate,
    rows,
    width,
    epsilon,
    scale,
    SQRT_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    offset = row * width + column
    h = tl.load(hidden + offset, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(key + offset, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0)
    inverse_hidden = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / width + epsilon)
    inverse_key = 1.0 / tl.sqrt(tl.sum(k * k, axis=0) / width + epsilon)
    score = tl.sum(h * k * w, axis=0) * inverse_hidden * inverse_key * scale
    tl.store(rows + row * 3, inverse_hidden)
    tl.store(rows + row * 3 + 1, inverse_key)
    tl.store(rows + row * 3 + 2, score)
    if SQRT_GATE:
        root = tl.sqrt(tl.maximum(tl.abs(score), _MIN_SCORE))
        score = tl.where(score > 0, root, tl.where(score < 0, -root, score))
    g = 1.0 / (1.0 + tl.exp(-score))
    tl.store(gate + row, g)
    v = tl.load(value + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(gated + offset, (g * v).to(gated.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    upstream,
    hidden,
    key,
    value,
    weight,
    gate,
    rows,
    d_hidden,
    d_key,
    d_value,
    partial,
    count,
    width,
    scale,
    SQRT_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(block * ROWS, tl.minimum(count, (block + 1) * ROWS)):
        offset = row * width + column
        up = tl.load(upstream + offset, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(hidden + offset, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(key + offset, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + offset, mask=inside, other=0.0).to(tl.float32)
        inverse_hidden = tl.load(rows + row * 3)
        inverse_key = tl.load(rows + row * 3 + 1)
        score = tl.load(rows + row * 3 + 2)
        g = tl.load(gate + row)
        d_score = tl.sum(up * v, axis=0) * g * (1.0 - g)
        if SQRT_GATE:
            magnitude = tl.abs(score)
            slope = 0.5 / tl.sqrt(tl.maximum(magnitude, _MIN_SCORE))
            d_score = tl.where(magnitude >= _MIN_SCORE, d_score * slope, 0.0)
        d_product = d_score * inverse_hidden * inverse_key * scale
        shrink_hidden = d_score * score * inverse_hidden * inverse_hidden / width
        shrink_key = d_score * score * inverse_key * inverse_key / width
        element = d_hidden.dtype.element_ty
        tl.store(d_hidden + offset, (d_product * k * w - shrink_hidden * h).to(element), mask=inside)
        tl.store(d_key + offset, (d_product * h * w - shrink_key * k).to(element), mask=inside)
        tl.store(d_value + offset, (g * up).to(element), mask=inside)
        total += d_product * h * k
    tl.store(partial + block * width + column, total, mask=inside)
