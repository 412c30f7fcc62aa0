"""Rows by index: validation and choice of the form.

An index is not checked: that its values lie in the table is the caller's duty, and one that does not reads or overwrites memory
that belongs to something else.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megamem_kernels.formats import ROWS, SCALES, bits_of, format_of, require, row_fields
from megamem_kernels.parallel import for_ranges
from megamem_kernels.row_gather import cpu

_GRAIN_BYTES = 1 << 16
_STREAMED_BYTES = 1 << 25
"""Results from this size on are written around the cache: they would not stay there until they are read."""


def copy_rows(source: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """``out[i] = source[index[i]]``, byte for byte.

    Args:
        source: ``[slots, *shape]`` of any dtype, contiguous. Where ``out`` is on a CUDA device: on the same one, or in pinned
            (or registered) host memory, which the kernel then reads through the bus.
        index: ``[n]`` int64 in ``[0, slots)`` (not checked), contiguous, on the device of ``out``.
        out: ``[n, *shape]`` of the dtype of ``source``, contiguous, sharing no memory with it.

    Returns:
        ``out``.

    Raises:
        ValueError: dtypes, shapes, devices or strides are others than these.
    """
    _require_pair(source, index, out)
    if out.is_cuda:
        from megamem_kernels.row_gather.triton import copy_rows_triton

        with torch.cuda.device(out.device):
            copy_rows_triton(source, index, out)
    elif out.numel():
        rows, where, result = _bytes(source), index.numpy(), _bytes(out)
        size = result.shape[1]
        streamed = result.nbytes >= _STREAMED_BYTES and (size | out.data_ptr()) % cpu.STREAM_BYTES == 0
        kernel = cpu.stream_rows if streamed else cpu.copy_rows
        for_ranges(lambda low, high: kernel(rows, where, result, low, high), len(index), grain=_GRAIN_BYTES // size + 1)
    return out


def scatter_rows(target: Tensor, index: Tensor, values: Tensor) -> None:
    """``target[index[i]] = values[i]``, byte for byte: the inverse of :func:`copy_rows`.

    Args:
        target: ``[slots, *shape]`` of any dtype, contiguous. Devices as for the ``source`` of :func:`copy_rows`.
        index: ``[n]`` int64, distinct, in ``[0, slots)`` (neither is checked), contiguous, on the device of ``values``.
        values: ``[n, *shape]`` of the dtype of ``target``, contiguous.

    Raises:
        ValueError: dtypes, shapes, devices or strides are others than these.
    """
    _require_pair(target, index, values)
    if values.is_cuda:
        from megamem_kernels.row_gather.triton import scatter_rows_triton

        with torch.cuda.device(values.device):
            scatter_rows_triton(target, index, values)
    elif values.numel():
        rows, where, origin = _bytes(target), index.numpy(), _bytes(values)
        for_ranges(
            lambda low, high: cpu.scatter_rows(rows, where, origin, low, high),
            len(index),
            grain=_GRAIN_BYTES // origin.shape[1] + 1,
        )


def gather_rows(fields: Mapping[str, Tensor], index: Tensor, out: Tensor) -> Tensor:
    """``out[i]`` is the row ``index[i]`` of stored rows, decoded.

    Decoding is exact in fp32. A bf16 ``out`` holds the decoded value rounded to nearest even, finite values staying finite.

    Args:
        fields: Stored rows ``[slots, ...]`` of :func:`megamem_kernels.formats.row_fields`, contiguous. Devices as for the
            ``source`` of :func:`copy_rows`.
        index: ``[n]`` int64 in ``[0, slots)`` (not checked), contiguous, on the device of ``out``.
        out: ``[n, width]`` fp32 or bf16, contiguous.

    Returns:
        ``out``.

    Raises:
        ValueError: dtypes, shapes, devices or strides are others than these.
    """
    rows = fields[ROWS]
    if out.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"rows are decoded to float32 or bfloat16, not to {out.dtype}")
    if rows.dtype == out.dtype:
        return copy_rows(rows, index, out)
    name = format_of(fields)
    count, width = out.shape
    require("out", out, out.dtype, (count, width), out.device)
    require("index", index, torch.int64, (count,), out.device)
    for field in row_fields(name, width):
        require(field.name, fields[field.name], field.dtype, (len(rows), *field.shape), _source_device(rows, out))
    if out.is_cuda:
        from megamem_kernels.row_gather.triton import gather_rows_triton

        with torch.cuda.device(out.device):
            gather_rows_triton(fields, index, out)
        return out
    arguments = [bits_of(rows), *([bits_of(fields[SCALES])] if name == "fp8" else []), index.numpy(), bits_of(out)]
    if name == "fp8":
        kernel = cpu.gather_fp8 if out.dtype == torch.float32 else cpu.gather_fp8_as_bf16
    else:
        kernel = cpu.gather_bf16 if name == "bf16" else cpu.gather_fp32_as_bf16
    grain = _GRAIN_BYTES // max(1, width * out.element_size()) + 1
    for_ranges(lambda low, high: kernel(*arguments, low, high), count, grain=grain)
    return out


def dequantize_rows(fields: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """All stored rows, decoded: :func:`gather_rows` with every row in its place."""
    return gather_rows(fields, torch.arange(len(out), device=out.device), out)


def _require_pair(table: Tensor, index: Tensor, rows: Tensor) -> None:
    require("index", index, torch.int64, (len(rows),), rows.device)
    require("the table", table, rows.dtype, (len(table), *rows.shape[1:]), _source_device(table, rows))
    require("the rows", rows, rows.dtype, tuple(rows.shape), rows.device)


def _source_device(table: Tensor, rows: Tensor) -> torch.device:
    return table.device if rows.is_cuda and table.is_pinned() else rows.device


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().view(len(tensor), -1).view(torch.uint8).numpy()
