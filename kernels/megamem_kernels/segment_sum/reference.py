"""Sums of rows that share a segment: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """``result[k]`` is the sum of ``values[i]`` over ``segment[i] == k``, added one by one for ascending ``i``.

    ``values`` ``[n, width]``, ``segment`` ``[n]`` int64 in ``[0, segments)``; result ``[segments, width]``.
    """
    result = torch.zeros(segments, values.shape[1], dtype=values.dtype, device=values.device)
    for i, k in enumerate(segment.tolist()):
        result[k] += values[i]
    return result
