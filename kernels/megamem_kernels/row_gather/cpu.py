"""Rows by index on the CPU. Every function handles items ``[low, high)`` of an index.

Rows come from memory in no order, so what counts is how many cache misses are under way at a time: each loop asks for rows
some turns ahead. A large result is written around the cache, which saves reading its lines before they are overwritten.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types, uint64
from numba.core import cgutils
from numba.extending import intrinsic

from megamem_kernels.jit import njit
from megamem_kernels.prefetch import emit_prefetch, prefetch_row
from megamem_kernels.rounding.cpu import load_bf16, load_fp8, store_bf16

STREAM_BYTES = 32
"""Step in which :func:`stream_rows` stores."""

_AHEAD = 16  # rows
_LINE = 64  # bytes

_options = {"nogil": True, "cache": True, "error_model": "numpy"}


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_prefetch(builder, builder.inttoptr(arguments[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic
def _stream(typing_context: Any, target: Any, source: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), STREAM_BYTES).as_pointer()
        value = builder.load(builder.inttoptr(arguments[1], vector), align=1)
        store = builder.store(value, builder.inttoptr(arguments[0], vector), align=STREAM_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@intrinsic
def _copy(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@intrinsic
def _fence(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@njit(**_options)
def copy_rows(source: np.ndarray, index: np.ndarray, out: np.ndarray, low: int, high: int) -> None:
    """``out[i] = source[index[i]]``; uint8 ``[slots, bytes]`` and ``[n, bytes]``."""
    size = uint64(out.shape[1])
    first, target = uint64(source.ctypes.data), uint64(out.ctypes.data) + uint64(low) * size
    for i in range(low, high):
        prefetch_row(source, index[min(i + _AHEAD, high - 1)])
        _copy(target, first + uint64(index[i]) * size, size)
        target += size


@njit(inline="always")
def _stream_rows(source: np.ndarray, index: np.ndarray, out: np.ndarray, size: np.uint64, low: int, high: int) -> None:
    first, target = uint64(source.ctypes.data), uint64(out.ctypes.data) + uint64(low) * size
    for i in range(low, high):
        ahead = first + uint64(index[min(i + _AHEAD, high - 1)]) * size
        for offset in range(uint64(0), size, uint64(_LINE)):
            _prefetch(ahead + offset)
        origin = first + uint64(index[i]) * size
        for offset in range(uint64(0), size, uint64(STREAM_BYTES)):
            _stream(target + offset, origin + offset)
        target += size


@njit(**_options)
def stream_rows(source: np.ndarray, index: np.ndarray, out: np.ndarray, low: int, high: int) -> None:
    """As :func:`copy_rows`, around the cache: the address of ``out`` and its rows are multiples of :data:`STREAM_BYTES`."""
    size = uint64(out.shape[1])
    # With a size that the compiler knows more rows are under way at a time, which makes up to a third of the speed. These two
    # are those of published Engram tables: 80 bf16 or 160 fp8 values, and 256 fp8 values; also 128 bf16 values.
    if size == 256:
        _stream_rows(source, index, out, uint64(256), low, high)
    elif size == 160:
        _stream_rows(source, index, out, uint64(160), low, high)
    else:
        _stream_rows(source, index, out, size, low, high)
    _fence()  # whoever reads the result after this call sees stores that went around the cache


@njit(**_options)
def scatter_rows(target: np.ndarray, index: np.ndarray, values: np.ndarray, low: int, high: int) -> None:
    """``target[index[i]] = values[i]``; uint8 ``[slots, bytes]`` and ``[n, bytes]``."""
    size = uint64(values.shape[1])
    first, origin = uint64(target.ctypes.data), uint64(values.ctypes.data) + uint64(low) * size
    for i in range(low, high):
        prefetch_row(target, index[min(i + _AHEAD, high - 1)])
        _copy(first + uint64(index[i]) * size, origin, size)
        origin += size


@njit(**_options)
def gather_bf16(rows: np.ndarray, index: np.ndarray, out: np.ndarray, low: int, high: int) -> None:
    """bf16 bits uint16 ``[slots, width]`` to fp32 ``[n, width]``."""
    for i in range(low, high):
        prefetch_row(rows, index[min(i + _AHEAD, high - 1)])
        load_bf16(rows[index[i]], out[i])


@njit(**_options)
def gather_fp8(rows: np.ndarray, scales: np.ndarray, index: np.ndarray, out: np.ndarray, low: int, high: int) -> None:
    """E4M3 codes uint8 ``[slots, width]`` with scales uint8 ``[slots, ceil(width / 32)]`` to fp32 ``[n, width]``."""
    for i in range(low, high):
        ahead = index[min(i + _AHEAD, high - 1)]
        prefetch_row(rows, ahead)
        prefetch_row(scales, ahead)
        load_fp8(rows[index[i]], scales[index[i]], out[i])


@njit(**_options)
def gather_fp8_as_bf16(
    rows: np.ndarray, scales: np.ndarray, index: np.ndarray, out: np.ndarray, low: int, high: int
) -> None:
    """As :func:`gather_fp8`, to bf16 bits uint16 ``[n, width]``."""
    scratch, lanes = np.empty(out.shape[1], np.float32), np.empty(0, np.uint16)
    for i in range(low, high):
        ahead = index[min(i + _AHEAD, high - 1)]
        prefetch_row(rows, ahead)
        prefetch_row(scales, ahead)
        load_fp8(rows[index[i]], scales[index[i]], scratch)
        store_bf16(scratch, lanes, True, out[i])


@njit(**_options)
def gather_fp32_as_bf16(rows: np.ndarray, index: np.ndarray, out: np.ndarray, low: int, high: int) -> None:
    """fp32 ``[slots, width]`` to bf16 bits uint16 ``[n, width]``, to nearest even."""
    lanes = np.empty(0, np.uint16)
    for i in range(low, high):
        prefetch_row(rows, index[min(i + _AHEAD, high - 1)])
        store_bf16(rows[index[i]], lanes, True, out[i])
