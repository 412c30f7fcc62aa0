"""Sums of rows that share a segment, in a fixed order."""

from __future__ import annotations

from torch import Tensor


def segment_sum(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """``result[k]`` is the sum of ``values[i]`` over ``segment[i] == k``, added one by one for ascending ``i``.

    The order of additions is fixed, so the result is the same bit for bit for any number of threads. CPU tensors only:
    on CUDA ``index_add_`` uses atomics.

    Args:
        values: ``[n, width]``, any floating dtype.
        segment: ``[n]`` int64 in ``[0, segments)``, in any order.
        segments: Number of rows of the result; a segment that no row names is zero.

    Returns:
        ``[segments, width]`` of the dtype of ``values``.

    Raises:
        ValueError: ``values`` is not on the CPU.
    """
    if values.device.type != "cpu":
        raise ValueError(f"segment_sum works on CPU tensors, not on {values.device}")
    return values.new_zeros(segments, values.shape[1]).index_add_(0, segment, values)
