"""Row formats: how a row of ``width`` fp32 values is stored, as one or two fixed-size fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

FP8_BLOCK = 32
"""Consecutive values of a row that share one ue8m0 scale."""

MIN_SCALE, MAX_SCALE = 7, 246
"""Least and largest ue8m0 byte written. With 2**120, the largest E4M3 values would leave fp32; with 2**-121, subnormal fp32
numbers would meet normal E4M3 ones, which is not worth a case of its own."""

FormatName = Literal["fp32", "bf16", "fp8"]

ROWS = "rows"
SCALES = "scales"


@dataclass(frozen=True, slots=True)
class Field:
    """One fixed-size part of a record: ``[records, *shape]`` of ``dtype``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def allocate(self, records: int) -> Tensor:
        """Zeros ``[records, *shape]`` on the CPU."""
        return torch.zeros(records, *self.shape, dtype=self.dtype)


def row_fields(name: FormatName, width: int) -> tuple[Field, ...]:
    """The fields of a row of ``width`` values.

    ``fp32`` and ``bf16``: ``rows``. ``fp8``: ``rows`` float8_e4m3fn ``[width]`` and ``scales`` uint8
    ``[ceil(width / 32)]``, where value ``j`` is ``rows[j] * 2.0 ** (scales[j // 32] - 127)`` (ue8m0).
    """
    if name == "fp32":
        return (Field(ROWS, torch.float32, (width,)),)
    if name == "bf16":
        return (Field(ROWS, torch.bfloat16, (width,)),)
    if name == "fp8":
        return (
            Field(ROWS, torch.float8_e4m3fn, (width,)),
            Field(SCALES, torch.uint8, (-(-width // FP8_BLOCK),)),
        )
    raise ValueError(f"row format {name}")


def format_of(fields: Mapping[str, Tensor]) -> FormatName:
    """The format of stored rows; ValueError where they are of none."""
    formats: dict[torch.dtype, FormatName] = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float8_e4m3fn: "fp8",
    }
    name = formats.get(fields[ROWS].dtype)
    if name is None or (name == "fp8") != (SCALES in fields):
        raise ValueError(f"no row format stores {[(key, tensor.dtype) for key, tensor in fields.items()]}")
    return name


def bits_of(tensor: Tensor) -> np.ndarray:
    """A CPU tensor as numpy sees it, sharing its memory: bf16 as uint16, E4M3 as uint8, any other dtype as it is."""
    unsigned = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}.get(tensor.dtype, tensor.dtype)
    return tensor.detach().view(unsigned).numpy()


def require(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """ValueError where an argument of a kernel is not contiguous, of this dtype and shape and on this device."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; "
            f"it must be contiguous {dtype} {shape} on {device}"
        )
