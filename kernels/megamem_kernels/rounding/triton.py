"""Rounding of rows to a storage format in Triton: a program handles tiles of 32 elements, the blocks that share a scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem_kernels.formats import FP8_BLOCK, MAX_SCALE, MIN_SCALE, ROWS, SCALES
from megamem_kernels.random import GOLDEN

_TILES = 32

_LANES = tl.constexpr(FP8_BLOCK)
_LEAST_SCALE, _LARGEST_SCALE = tl.constexpr(MIN_SCALE), tl.constexpr(MAX_SCALE)
_GOLDEN = tl.constexpr(GOLDEN)
_M1, _M2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * _M1
    x = (x ^ (x >> 27)) * _M2
    return x ^ (x >> 31)


@triton.jit
def random_lanes(key, step, ids, element):
    """16 random bits, uint32, of ``element`` (int32) of the rows ``ids`` (int64); shapes broadcast."""
    stepped = _mix64(key.to(tl.uint64) + step.to(tl.uint64) * _GOLDEN)
    row = _mix64(stepped ^ ids.to(tl.uint64))
    word = _mix64(row + (element // 4 + 1).to(tl.uint64) * _GOLDEN)
    return ((word >> (element % 4 * 16).to(tl.uint64)) & 0xFFFF).to(tl.uint32)


@triton.jit
def nearest_even(fixed):
    """What to add to uint32 numbers with 16 fraction bits so that cutting them off rounds to nearest even."""
    return ((fixed >> 16) & 1) + 0x7FFF


@triton.jit
def round_bf16(bits, r16):
    """fp32 bits and random bits, uint32, to bf16 bits as uint16."""
    magnitude = bits & 0x7FFFFFFF
    rounded = (bits + r16) >> 16
    rounded = tl.where((rounded & 0x7FFF) == 0x7F80, rounded - 1, rounded)
    special = (bits >> 16) | tl.where(magnitude > 0x7F800000, 0x40, 0).to(tl.uint32)
    return tl.where(magnitude >= 0x7F800000, special, rounded).to(tl.uint16)


@triton.jit
def scale_fp8(largest):
    """ue8m0 bytes, as int32, of blocks whose largest magnitudes have the fp32 bits ``largest``, int32."""
    exponent = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.where(largest == 0, 127, tl.minimum(tl.maximum(exponent, _LEAST_SCALE), _LARGEST_SCALE))


@triton.jit
def round_fp8(bits, scale, r16, NEAREST: tl.constexpr):
    """fp32 bits uint32, divided by ue8m0 scales int32, to E4M3 codes as uint8; ``r16`` is not read where ``NEAREST``."""
    magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
    exponent = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | tl.where(exponent > 0, 0x800000, 0)
    exponent = tl.maximum(exponent, 1) - scale
    step = tl.maximum(exponent, -6)
    shift = tl.minimum(step - exponent + 4, 31)
    fixed = significand >> shift
    if NEAREST:
        fixed = fixed | ((fixed << shift) != significand).to(tl.int32)
        r16 = nearest_even(fixed)
    code = tl.minimum(((fixed + r16.to(tl.int32)) >> 16) + 8 * (step + 6), 0x7E)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return code.to(tl.uint8) | ((bits >> 24) & 0x80).to(tl.uint8)


@triton.jit(do_not_specialize=["key", "step"])
def _quantize(
    values, rows, scales, ids, key, step, tiles, width, FP8: tl.constexpr, NEAREST: tl.constexpr, TILES: tl.constexpr
):
    per_row = tl.cdiv(width, _LANES)
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    row, block = tile // per_row, (tile % per_row).to(tl.int32)
    element = block[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    live = (tile < tiles)[:, None] & (element < width)
    at = row[:, None] * width + element
    bits = tl.load(values + at, mask=live, other=0.0).to(tl.uint32, bitcast=True)
    if NEAREST:
        r16 = nearest_even(bits)
    else:
        r16 = random_lanes(key, step, tl.load(ids + row, mask=tile < tiles, other=0)[:, None], element)
    if FP8:
        scale = scale_fp8(tl.max((bits & 0x7FFFFFFF).to(tl.int32), axis=1))
        tl.store(scales + tile, scale.to(tl.uint8), mask=tile < tiles)
        tl.store(rows + at, round_fp8(bits, scale[:, None], r16, NEAREST), mask=live)
    else:
        tl.store(rows + at, round_bf16(bits, r16), mask=live)


def quantize_rows_triton(
    values: Tensor, fields: Mapping[str, Tensor], *, key: int, step: int, ids: Tensor | None
) -> None:
    """See the op; ``fields`` are bf16 or fp8."""
    fp8 = SCALES in fields
    count, width = values.shape
    tiles = count * triton.cdiv(width, FP8_BLOCK)
    if not tiles:
        return
    rows = fields[ROWS].view(torch.uint8 if fp8 else torch.uint16)
    _quantize[(triton.cdiv(tiles, _TILES),)](
        values,
        rows,
        fields[SCALES] if fp8 else rows,
        values if ids is None else ids,
        key,
        step,
        tiles,
        width,
        FP8=fp8,
        NEAREST=ids is None,
        TILES=_TILES,
    )
