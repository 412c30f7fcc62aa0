"""Sums of rows that share a segment: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(
    values: Tensor, segment: Tensor, segments: int, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """``result[k]`` is the sum of ``values[i]`` over ``segment[i] == k``, added one by one in fp32 for ascending ``i``.

    Arguments and result as in the op; ``accumulate`` starts from ``out`` in place of zeros.
    """
    if out is None:
        out = torch.zeros(segments, values.shape[1], device=values.device)
    elif not accumulate:
        out.zero_()
    for i, k in enumerate(segment.tolist()):
        out[k] += values[i].float()
    return out
