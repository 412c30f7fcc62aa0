"""Rounding of rows to a storage format: the definition, in exact float64 arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megamem_kernels.formats import FP8_BLOCK, MAX_SCALE, MIN_SCALE, ROWS, SCALES, bits_of, format_of
from megamem_kernels.random import GOLDEN


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_lanes(key: int, step: int, ids: np.ndarray, width: int) -> np.ndarray:
    """16 random bits of each element of the rows ``ids`` ``[n]``: int64 ``[n, width]``."""
    golden = np.uint64(GOLDEN)
    stepped = _mix64(np.array([key], dtype=np.uint64) + np.array([step], dtype=np.uint64) * golden)
    rows = _mix64(stepped ^ ids.astype(np.uint64))
    element = np.arange(width, dtype=np.uint64)
    words = _mix64(rows[:, None] + (element // np.uint64(4) + np.uint64(1)) * golden)
    return ((words >> (element % np.uint64(4) * np.uint64(16))) & np.uint64(0xFFFF)).astype(np.int64)


def quantize_rows(
    values: Tensor, fields: Mapping[str, Tensor], *, key: int = 0, step: int = 0, ids: Tensor | None = None
) -> None:
    """See the op."""
    lanes = None if ids is None else random_lanes(key, step, ids.numpy(), values.shape[1])
    x = values.numpy()
    name = format_of(fields)
    if name == "fp32":
        fields[ROWS].copy_(values)
    elif name == "bf16":
        bits_of(fields[ROWS])[:] = _bf16(x, lanes)
    else:
        bits_of(fields[ROWS])[:], bits_of(fields[SCALES])[:] = _fp8(x, lanes)


def _bf16(x: np.ndarray, lanes: np.ndarray | None) -> np.ndarray:
    bits = x.view(np.uint32).astype(np.int64)
    if lanes is None:
        rounded = bits_of(torch.from_numpy(x).bfloat16()).astype(np.int64)
    else:
        rounded = np.where(np.isfinite(x), (bits + lanes) >> 16, bits >> 16 | np.where(np.isnan(x), 0x40, 0))
    overflow = np.isfinite(x) & (rounded & 0x7FFF == 0x7F80)
    return (rounded - overflow).astype(np.uint16)


def _fp8(x: np.ndarray, lanes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    count, width = x.shape
    blocks = -(-width // FP8_BLOCK)
    padded = np.zeros((count, blocks * FP8_BLOCK))
    padded[:, :width] = x
    largest = np.abs(padded).reshape(count, blocks, FP8_BLOCK).max(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.ceil(np.log2(largest / 448))
        exponent += largest > 448 * 2.0**exponent  # log2 may err by one unit in the last place
        exponent -= largest <= 448 * 2.0 ** (exponent - 1)
        exponent = np.where(np.isfinite(largest), np.clip(exponent, MIN_SCALE - 127, MAX_SCALE - 127), MAX_SCALE - 127)
    exponent[largest == 0] = 0
    magnitude = np.abs(padded / 2.0 ** exponent.repeat(FP8_BLOCK, axis=1))[:, :width]
    magnitude = np.minimum(magnitude, 448)  # NaN stays NaN
    last_place = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(magnitude, 2.0**-20))), -6) - 3)
    units = magnitude / last_place
    if lanes is None:
        whole = np.rint(units)
    else:
        whole = np.floor(units)
        whole += np.floor((units - whole) * 2**16) + lanes >= 2**16
    signed = np.copysign(whole * last_place, x)
    codes = bits_of(torch.from_numpy(signed).to(torch.float8_e4m3fn))
    return codes, (exponent + 127).astype(np.uint8)
