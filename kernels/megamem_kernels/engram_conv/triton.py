"""The Engram convolution on CUDA devices. Rows are (position, sequence) pairs in that order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem_kernels.engram_gate.triton import whole_rows

BLOCK_ROWS = 32
"""Rows whose share of the weight gradient one program sums."""
_BLOCK = 256  # columns of a program where a row needs no sum


def forward(
    gated: Tensor, documents: Tensor, taps: Tensor, *, first: int, stride: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """As :func:`megamem_kernels.engram_conv.cpu.forward`."""
    rows, width = gated.shape
    output, inverse = gated.new_empty(rows - first, width), gated.new_empty(rows, dtype=torch.float32)
    if rows:
        _inverse_rms[(rows,)](gated, inverse, width, epsilon, **whole_rows(width))
    if rows > first:
        _forward[(rows - first, triton.cdiv(width, _BLOCK))](
            gated, inverse, documents, taps, output, first, stride, width, TAPS=len(taps), BLOCK=_BLOCK
        )
    return output, inverse


def backward(
    upstream: Tensor, gated: Tensor, documents: Tensor, taps: Tensor, inverse: Tensor, *, first: int, stride: int
) -> tuple[Tensor, Tensor]:
    """As :func:`megamem_kernels.engram_conv.cpu.backward`."""
    (rows, width), count = gated.shape, len(upstream)
    gradient, d_sum = torch.empty_like(gated), torch.empty_like(upstream, dtype=torch.float32)
    partial = gated.new_empty(triton.cdiv(count, BLOCK_ROWS), *taps.shape, dtype=torch.float32)
    if count:
        _backward_taps[(len(partial), triton.cdiv(width, _BLOCK))](
            upstream,
            gated,
            inverse,
            documents,
            taps,
            d_sum,
            partial,
            count,
            first,
            stride,
            width,
            TAPS=len(taps),
            TAPS_PADDED=triton.next_power_of_2(len(taps)),
            ROWS=BLOCK_ROWS,
            BLOCK=_BLOCK,
        )
    if rows:
        _backward_rows[(rows,)](
            upstream,
            d_sum,
            gated,
            inverse,
            documents,
            taps,
            gradient,
            rows,
            first,
            stride,
            width,
            TAPS=len(taps),
            **whole_rows(width),
        )
    return gradient, partial.sum(0)


@triton.jit
def _inverse_rms(x, inverse, width, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(inverse + row, 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + epsilon))


@triton.jit
def _forward(x, inverse, documents, taps, output, first, stride, width, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    row = first + i
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    document = tl.load(documents + row)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        source = row - stride * (TAPS - 1 - tap)
        seen = source >= 0
        seen = seen & (tl.load(documents + source, mask=seen, other=0) == document)
        visible = tl.where(seen, width, 0)
        value = tl.load(x + source * width + column, mask=column < visible, other=0.0).to(tl.float32)
        factor = tl.load(taps + tap * width + column, mask=inside, other=0.0)
        total += factor * (value * tl.load(inverse + source, mask=seen, other=0.0))
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    result = total / (1.0 + tl.exp(-total)) + value
    tl.store(output + i * width + column, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward_taps(
    upstream,
    x,
    inverse,
    documents,
    taps,
    d_sum,
    partial,
    count,
    first,
    stride,
    width,
    TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    tap = tl.arange(0, TAPS_PADDED)
    tile = tap[:, None] * width + column[None, :]
    tile_inside = (tap < TAPS)[:, None] & inside[None, :]
    factor = tl.load(taps + tile, mask=tile_inside, other=0.0)
    d_taps = tl.zeros([TAPS_PADDED, BLOCK], dtype=tl.float32)
    for i in range(block * ROWS, tl.minimum(count, (block + 1) * ROWS)):
        row = first + i
        source = row - stride * (TAPS - 1 - tap)
        seen = (tap < TAPS) & (source >= 0)
        seen = seen & (tl.load(documents + source, mask=seen, other=0) == tl.load(documents + row))
        offset = source[:, None] * width + column[None, :]
        normed = tl.load(x + offset, mask=seen[:, None] & inside[None, :], other=0.0).to(tl.float32)
        normed = normed * tl.load(inverse + source, mask=seen, other=0.0)[:, None]
        total = tl.sum(factor * normed, axis=0)
        s = 1.0 / (1.0 + tl.exp(-total))
        up = tl.load(upstream + i * width + column, mask=inside, other=0.0).to(tl.float32)
        d_total = up * (s + total * s * (1.0 - s))
        tl.store(d_sum + i * width + column, d_total, mask=inside)
        d_taps += d_total[None, :] * normed
    tl.store(partial + block * TAPS * width + tile, d_taps, mask=tile_inside)


@triton.jit
def _backward_rows(
    upstream,
    d_sum,
    x,
    inverse,
    documents,
    taps,
    gradient,
    rows,
    first,
    stride,
    width,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    document = tl.load(documents + row)
    d_normed = tl.zeros([BLOCK], dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        target = row + stride * (TAPS - 1 - tap)
        seen = (target >= first) & (target < rows)
        seen = seen & (tl.load(documents + target, mask=seen, other=0) == document)
        visible = tl.where(seen, width, 0)
        value = tl.load(d_sum + (target - first) * width + column, mask=column < visible, other=0.0)
        d_normed += tl.load(taps + tap * width + column, mask=inside, other=0.0) * value
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(inverse + row)
    shrink = tl.sum(d_normed * value, axis=0) * scale * scale * scale / width
    visible = tl.where(row >= first, width, 0)
    passed = tl.load(upstream + (row - first) * width + column, mask=column < visible, other=0.0)
    result = d_normed * scale - shrink * value + passed.to(tl.float32)
    tl.store(gradient + row * width + column, result.to(gradient.dtype.element_ty), mask=inside)
