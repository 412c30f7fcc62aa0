"""Rows by index in Triton: a program handles tiles of 32 words or elements, neighbouring ones of a row side by side.

A table in host memory is read and written through the bus (UVA). Triton takes its address from the driver, which knows one for
memory that is pinned (``pin_memory``) or registered (``cudaHostRegister``), and refuses any other CPU tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem_kernels.formats import FP8_BLOCK, ROWS, SCALES
from megamem_kernels.rounding.triton import nearest_even, round_bf16

_TILES = 32

_LANES = tl.constexpr(FP8_BLOCK)


@triton.jit
def _copy(table, index, rows, tiles, width, SCATTER: tl.constexpr, TILES: tl.constexpr):
    per_row = tl.cdiv(width, _LANES)
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    item = tile // per_row
    word = (tile % per_row)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    live = (tile < tiles)[:, None] & (word < width)
    there = table + tl.load(index + item, mask=tile < tiles, other=0)[:, None] * width + word
    here = rows + item[:, None] * width + word
    if SCATTER:
        tl.store(there, tl.load(here, mask=live), mask=live)
    else:
        tl.store(here, tl.load(there, mask=live), mask=live)


def copy_rows_triton(source: Tensor, index: Tensor, out: Tensor) -> None:
    """See the op."""
    _launch_copy(source, index, out, scatter=False)


def scatter_rows_triton(target: Tensor, index: Tensor, values: Tensor) -> None:
    """See the op."""
    _launch_copy(target, index, values, scatter=True)


def _launch_copy(table: Tensor, index: Tensor, rows: Tensor, *, scatter: bool) -> None:
    if not rows.numel():
        return
    byte_table, byte_rows = (tensor.detach().view(len(tensor), -1).view(torch.uint8) for tensor in (table, rows))
    size = byte_rows.shape[1]
    word = next(
        dtype
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if all(value % dtype.itemsize == 0 for value in (size, table.data_ptr(), rows.data_ptr()))
    )
    width = size // word.itemsize
    tiles = len(rows) * triton.cdiv(width, FP8_BLOCK)
    _copy[(triton.cdiv(tiles, _TILES),)](
        byte_table.view(word), index, byte_rows.view(word), tiles, width, SCATTER=scatter, TILES=_TILES
    )


@triton.jit
def decode_fp8(code, scale):
    """E4M3 codes and ue8m0 bytes, both uint8 and broadcasting, to fp32."""
    code, scale = code.to(tl.uint32), scale.to(tl.uint32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where((code & 0x80) != 0, -value, value)
    power = tl.where(scale == 0, 1 << 22, tl.where(scale == 255, 0x7FC00000, scale << 23)).to(tl.uint32)
    value = value * power.to(tl.float32, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def _gather(
    rows,
    scales,
    index,
    out,
    tiles,
    width,
    FP8: tl.constexpr,
    BF16: tl.constexpr,
    OUT_BF16: tl.constexpr,
    TILES: tl.constexpr,
):
    per_row = tl.cdiv(width, _LANES)
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    item, block = tile // per_row, tile % per_row
    element = block[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    live = (tile < tiles)[:, None] & (element < width)
    slot = tl.load(index + item, mask=tile < tiles, other=0)
    stored = tl.load(rows + slot[:, None] * width + element, mask=live, other=0)
    if FP8:
        scale = tl.load(scales + slot * per_row + block, mask=tile < tiles, other=127)
        value = decode_fp8(stored, scale[:, None])
    elif BF16:
        value = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = stored
    target = out + item[:, None] * width + element
    if OUT_BF16:
        bits = value.to(tl.uint32, bitcast=True)
        tl.store(target, round_bf16(bits, nearest_even(bits)), mask=live)
    else:
        tl.store(target, value, mask=live)


def gather_rows_triton(fields: Mapping[str, Tensor], index: Tensor, out: Tensor) -> None:
    """See the op; rows are not of the dtype of ``out``."""
    rows = fields[ROWS]
    fp8, bf16, out_bf16 = SCALES in fields, rows.dtype == torch.bfloat16, out.dtype == torch.bfloat16
    count, width = out.shape
    tiles = count * triton.cdiv(width, FP8_BLOCK)
    if not tiles:
        return
    bits = rows.view(torch.uint8 if fp8 else torch.uint16 if bf16 else torch.float32)
    _gather[(triton.cdiv(tiles, _TILES),)](
        bits,
        fields[SCALES] if fp8 else bits,
        index,
        out.view(torch.uint16) if out_bf16 else out,
        tiles,
        width,
        FP8=fp8,
        BF16=bf16,
        OUT_BF16=out_bf16,
        TILES=_TILES,
    )
