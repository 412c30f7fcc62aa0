"""Sums of rows that share a segment, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from megamem_kernels.elements import elements
from megamem_kernels.segment_sum import cpu


def segment_sum(
    values: Tensor, segment: Tensor, segments: int, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """``result[k]`` is the sum of ``values[i]`` over ``segment[i] == k``, added one by one in fp32 for ascending ``i``.

    The order of additions is fixed, so the result is the same bit for bit for any number of threads, on the CPU and on
    CUDA alike.

    Args:
        values: ``[n, width]`` fp32 or bf16, contiguous.
        segment: ``[n]`` int64 in ``[0, segments)``, in any order, on the device of ``values``.
        segments: Number of rows of the result; one that no occurrence names is zero.
        out: ``[segments, width]`` fp32, contiguous, overwritten and returned; None allocates it.
        accumulate: Add to what ``out`` holds in place of overwriting it.

    Returns:
        ``[segments, width]`` fp32.

    Raises:
        ValueError: wrong shapes or dtypes; on the CPU also a segment out of range (on CUDA nothing checks).
    """
    if values.dtype not in (torch.float32, torch.bfloat16) or values.dim() != 2 or not values.is_contiguous():
        raise ValueError(f"values are {values.dtype} {list(values.shape)}, not contiguous fp32 or bf16 [n, width]")
    if segment.dtype != torch.int64 or segment.shape != values.shape[:1] or segment.device != values.device:
        raise ValueError(
            f"segment is {segment.dtype} {list(segment.shape)} on {segment.device} for {len(values)} values"
        )
    shape = (segments, values.shape[1])
    if out is None:
        if accumulate:
            raise ValueError("accumulate without out")
        out = torch.empty(shape, device=values.device)
    elif out.dtype != torch.float32 or out.shape != shape or not out.is_contiguous() or out.device != values.device:
        raise ValueError(f"out is {out.dtype} {list(out.shape)} on {out.device}, not contiguous fp32 {list(shape)}")
    if values.device.type == "cpu":
        cpu.segment_sum(elements(values), segment.contiguous().numpy(), elements(out), accumulate)
    else:
        from megamem_kernels.segment_sum import triton

        with torch.cuda.device(values.device):
            triton.segment_sum(values, segment.contiguous(), out, accumulate)
    return out
