"""Sums of rows that share a segment, in Triton: one program for each segment and block of columns, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024


def column_block(width: int) -> int:
    """Columns that one program handles."""
    return min(MAX_BLOCK, triton.next_power_of_2(max(1, width)))


def group(segment: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """``(offsets [segments + 1], order [n])`` int64: occurrences of segment ``k`` are ``order[offsets[k]:offsets[k + 1]]``,
    ascending. ``segment``: ``[n]`` int64 in ``[0, segments)``."""
    ordered, order = torch.sort(segment, stable=True)
    return torch.searchsorted(ordered, torch.arange(segments + 1, device=segment.device)), order


@triton.jit
def _sum(values, offsets, order, out, width, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    target = out + k * width + columns
    total = tl.zeros([BLOCK], tl.float32)
    if ACCUMULATE:
        total = tl.load(target, mask)
    for p in range(tl.load(offsets + k), tl.load(offsets + k + 1)):
        row = tl.load(order + p)
        total += tl.load(values + row * width + columns, mask, other=0).to(tl.float32)
    tl.store(target, total, mask)


def segment_sum(values: Tensor, segment: Tensor, out: Tensor, accumulate: bool) -> None:
    """See the op."""
    segments, width = out.shape
    if out.numel():
        block = column_block(width)
        grid = (segments, triton.cdiv(width, block))
        _sum[grid](values, *group(segment, segments), out, width, ACCUMULATE=accumulate, BLOCK=block)
