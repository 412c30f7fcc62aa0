"""Weighted sums of the rows of bags in Triton: a program for each bag, row or occurrence and block of columns, no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megamem_kernels.segment_sum.triton import column_block, group


@triton.jit
def _forward(rows, index, weights, out, size, width, BLOCK: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(size):
        at = bag * size + j
        row = tl.load(rows + tl.load(index + at) * width + columns, mask=mask, other=0.0)
        total += tl.load(weights + at) * row.to(tl.float32)
    tl.store(out + bag * width + columns, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _row_gradient(
    gradient, offsets, order, weights, row_gradient, size, width, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr
):
    k = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    target = row_gradient + k * width + columns
    total = tl.zeros([BLOCK], tl.float32)
    if ACCUMULATE:
        total = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    for p in range(tl.load(offsets + k), tl.load(offsets + k + 1)):
        at = tl.load(order + p)
        upstream = tl.load(gradient + at // size * width + columns, mask=mask, other=0.0)
        total += tl.load(weights + at) * upstream.to(tl.float32)
    tl.store(target, total.to(row_gradient.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient(gradient, rows, index, weight_gradient, size, width, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    upstream, row = gradient + at // size * width, rows + tl.load(index + at) * width
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        value = tl.load(upstream + columns, mask=mask, other=0.0).to(tl.float32)
        total += value * tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(weight_gradient + at, tl.sum(total, axis=0))


def forward(rows: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
    """Fill ``out`` ``[bags, width]``; ``index`` int64 and ``weights`` fp32 ``[bags, j]``."""
    bags, width = out.shape
    if out.numel():
        block = column_block(width)
        grid = (bags, triton.cdiv(width, block))
        _forward[grid](rows, index, weights, out, index.shape[1], width, BLOCK=block)


def backward(
    gradient: Tensor,
    rows: Tensor,
    index: Tensor,
    weights: Tensor,
    row_gradient: Tensor | None,
    accumulate: bool,
    weight_gradient: Tensor | None,
) -> None:
    """As :func:`megamem_kernels.bag_sum.cpu.backward`."""
    (unique, width), size = rows.shape, index.shape[1]
    block = column_block(width)
    if row_gradient is not None and row_gradient.numel():
        offsets, order = group(index.reshape(-1), unique)
        grid = (unique, triton.cdiv(width, block))
        _row_gradient[grid](
            gradient, offsets, order, weights, row_gradient, size, width, ACCUMULATE=accumulate, BLOCK=block
        )
    if weight_gradient is not None and weight_gradient.numel():
        _weight_gradient[(weight_gradient.numel(),)](gradient, rows, index, weight_gradient, size, width, BLOCK=block)
