"""Rounding of fp32 rows to bf16 and fp8, compiled: what CPU kernels inline when they store a row, and loops over many rows.

Bit patterns are whole numbers here: fp32 as uint32, bf16 as uint16, E4M3 as uint8. The rule is in
:mod:`megamem_kernels.rounding.op`.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import int32, uint8, uint16, uint32, uint64

from megamem_kernels.formats import FP8_BLOCK, MAX_SCALE, MIN_SCALE
from megamem_kernels.jit import njit
from megamem_kernels.random import row_key, word

_S16 = np.uint32(16)
_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_FRACTION, _HIDDEN = np.uint32(0x7FFFFF), np.uint32(0x800000)
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
_UE8M0 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()


@njit(inline="always")
def random_lanes(keyed_row: np.uint64, words: np.ndarray) -> np.ndarray:
    """16 random bits for each element of a row, uint16 ``[4 * len(words)]``: a view of ``words``, which is overwritten.

    Args:
        keyed_row: uint64 of :func:`megamem_kernels.random.row_key`.
        words: Scratch uint64 ``[ceil(width / 4)]``. Lane 0 of a word is its lowest 16 bits: a little-endian machine.
    """
    for i in range(len(words)):
        words[i] = word(keyed_row, uint64(i))
    return words.view(np.uint16)


@njit(inline="always")
def round_bf16(bits: np.uint32, r16: np.uint32) -> np.uint16:
    """fp32 bits to bf16 bits: up with probability (dropped 16 bits) / 2**16 where ``r16`` is uniform in ``[0, 2**16)``."""
    magnitude = uint32(bits & _MAGNITUDE)
    rounded = uint32(uint32(bits + r16) >> _S16)
    if rounded & uint32(0x7FFF) == uint32(0x7F80):
        rounded = uint32(rounded - uint32(1))
    if magnitude >= _INFINITY:
        quiet = uint32(0x40) if magnitude > _INFINITY else uint32(0)
        rounded = uint32((bits >> _S16) | quiet)
    return uint16(rounded)


@njit(inline="always")
def nearest_even(fixed: np.uint32) -> np.uint32:
    """What to add to a number with 16 fraction bits so that cutting them off rounds to nearest even."""
    return uint32(uint32(0x7FFF) + ((fixed >> _S16) & uint32(1)))


@njit(inline="always")
def scale_fp8(largest: np.uint32) -> np.uint8:
    """ue8m0 byte of a block whose largest magnitude has the fp32 bits ``largest``: the smallest power of two that brings
    it to 448 or below."""
    exponent = int32(largest >> uint32(23)) - int32(8)
    if largest & _FRACTION > uint32(0x600000):
        exponent += int32(1)
    return uint8(127) if largest == uint32(0) else uint8(min(max(exponent, int32(MIN_SCALE)), int32(MAX_SCALE)))


@njit(inline="always")
def round_fp8(bits: np.uint32, scale: np.uint8, r16: np.uint32, nearest: bool) -> np.uint8:
    """fp32 bits, divided by a ue8m0 scale, to E4M3 bits; ``r16`` as in :func:`round_bf16`, unused where ``nearest``."""
    magnitude = uint32(bits & _MAGNITUDE)
    exponent = int32(magnitude >> uint32(23))
    significand = uint32(magnitude & _FRACTION)
    if exponent > int32(0):
        significand = uint32(significand | _HIDDEN)
    exponent = int32(max(exponent, int32(1)) - int32(scale))
    step = int32(max(exponent, int32(-6)))  # below 2**-6 the values of E4M3 are evenly spaced
    shift = uint32(min(step - exponent + int32(4), int32(31)))
    fixed = uint32(significand >> shift)  # in units of the last place of E4M3, with 16 fraction bits
    if nearest:
        if uint32(fixed << shift) != significand:
            fixed = uint32(fixed | uint32(1))
        r16 = nearest_even(fixed)
    code = int32((fixed + r16) >> _S16) + int32(8) * (step + int32(6))
    code = min(code, int32(0x7E))
    if magnitude > _INFINITY:
        code = int32(0x7F)
    return uint8(uint32(code) | uint32((bits >> uint32(24)) & uint32(0x80)))


@njit
def store_bf16(values: np.ndarray, lanes: np.ndarray, nearest: bool, out: np.ndarray) -> None:
    """Round one row: fp32 ``[width]`` to bf16 bits uint16 ``[width]``.

    ``lanes``: :func:`random_lanes` of the row, not read where ``nearest``. All arrays are C-contiguous.
    """
    bits = values.view(np.uint32)
    if nearest:
        for e in range(len(out)):
            out[e] = round_bf16(bits[e], nearest_even(bits[e]))
    else:
        for e in range(len(out)):
            out[e] = round_bf16(bits[e], uint32(lanes[e]))


@njit(inline="always")
def _store_block(
    bits: np.ndarray, lanes: np.ndarray, nearest: bool, out: np.ndarray, scales: np.ndarray, block: int, count: int
) -> None:
    low = block * FP8_BLOCK
    largest = uint32(0)
    for e in range(count):
        magnitude = uint32(bits[low + e] & _MAGNITUDE)
        largest = magnitude if magnitude > largest else largest
    scale = scale_fp8(largest)
    scales[block] = scale
    if nearest:
        for e in range(count):
            out[low + e] = round_fp8(bits[low + e], scale, uint32(0), True)
    else:
        for e in range(count):
            out[low + e] = round_fp8(bits[low + e], scale, uint32(lanes[low + e]), False)


@njit
def store_fp8(values: np.ndarray, lanes: np.ndarray, nearest: bool, out: np.ndarray, scales: np.ndarray) -> None:
    """Round one row: fp32 ``[width]`` to E4M3 codes uint8 ``[width]`` and scales uint8 ``[ceil(width / 32)]``.

    ``lanes``: :func:`random_lanes` of the row, not read where ``nearest``. All arrays are C-contiguous.
    """
    bits = values.view(np.uint32)
    whole = len(out) // FP8_BLOCK
    for block in range(whole):  # a count that the compiler knows: about four times as fast
        _store_block(bits, lanes, nearest, out, scales, block, FP8_BLOCK)
    if whole < len(scales):
        _store_block(bits, lanes, nearest, out, scales, whole, len(out) - whole * FP8_BLOCK)


@njit
def load_bf16(row: np.ndarray, out: np.ndarray) -> None:
    """bf16 bits uint16 ``[width]`` to fp32 ``[width]``; C-contiguous."""
    bits = out.view(np.uint32)
    for e in range(len(row)):
        bits[e] = uint32(row[e]) << _S16


@njit(inline="always")
def _load_block(codes: np.ndarray, scale: np.float32, out: np.ndarray, low: int, count: int) -> None:
    for e in range(count):
        out[low + e] = _E4M3[codes[low + e]] * scale


@njit
def load_fp8(codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """E4M3 codes uint8 ``[width]`` with scales uint8 ``[ceil(width / 32)]`` to fp32 ``[width]``; C-contiguous."""
    whole = len(codes) // FP8_BLOCK
    for block in range(whole):
        _load_block(codes, _UE8M0[scales[block]], out, block * FP8_BLOCK, FP8_BLOCK)
    if whole < len(scales):
        _load_block(codes, _UE8M0[scales[whole]], out, whole * FP8_BLOCK, len(codes) - whole * FP8_BLOCK)


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_bf16(
    values: np.ndarray, out: np.ndarray, ids: np.ndarray, key: np.uint64, step: np.uint64, low: int, high: int
) -> None:
    """Rows ``[low, high)`` of fp32 ``[n, width]`` to uint16 ``[n, width]``; to nearest even where ``ids`` is empty."""
    nearest = len(ids) == 0
    words = np.empty((values.shape[1] + 3) // 4, dtype=np.uint64)
    lanes = words.view(np.uint16)
    for i in range(low, high):
        if not nearest:
            lanes = random_lanes(row_key(key, step, uint64(ids[i])), words)
        store_bf16(values[i], lanes, nearest, out[i])


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_fp8(
    values: np.ndarray,
    out: np.ndarray,
    scales: np.ndarray,
    ids: np.ndarray,
    key: np.uint64,
    step: np.uint64,
    low: int,
    high: int,
) -> None:
    """As :func:`quantize_bf16`, to codes uint8 ``[n, width]`` and scales uint8 ``[n, ceil(width / 32)]``."""
    nearest = len(ids) == 0
    words = np.empty((values.shape[1] + 3) // 4, dtype=np.uint64)
    lanes = words.view(np.uint16)
    for i in range(low, high):
        if not nearest:
            lanes = random_lanes(row_key(key, step, uint64(ids[i])), words)
        store_fp8(values[i], lanes, nearest, out[i], scales[i])
