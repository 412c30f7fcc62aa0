"""Rounding of fp32 rows to a storage format: validation and choice of the form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megamem_kernels.formats import ROWS, SCALES, bits_of, format_of, require, row_fields
from megamem_kernels.parallel import for_ranges
from megamem_kernels.rounding.cpu import quantize_bf16, quantize_fp8

_GRAIN_ELEMENTS = 1 << 15
_NEAREST = np.empty(0, dtype=np.int64)


def quantize_rows(
    values: Tensor, fields: Mapping[str, Tensor], *, key: int = 0, step: int = 0, ids: Tensor | None = None
) -> None:
    """Round fp32 rows into the fields of a storage format: stochastically where ``ids`` are given, else to nearest even.

    Element ``e`` of a row takes 16 random bits ``r``: lane ``e % 4``, lowest first, of
    ``word(row_key(key, step, id), e // 4)`` (:mod:`megamem_kernels.random`), so the result depends on nothing else.

    - ``bf16``: the fp32 bits plus ``r``, without their lower half.
    - ``fp8``: a block of 32 values is divided by its scale, the smallest power of two ``2 ** (byte - 127)`` that brings the
      largest magnitude to 448 or below (``byte`` in ``[7, 246]``; 127 for a block of zeros; OCP Microscaling Formats v1.0,
      section 6.3). A quotient between two neighbouring E4M3 values goes to the upper one where ``r`` plus the first 16 bits of
      its distance from the lower one, in units of theirs, reaches ``2 ** 16``. Magnitudes beyond 448 become 448.
    - ``fp32``: copied.

    So the expected value is the value itself, short of up to 2**-16 of the distance between neighbours; values that the format
    holds stay what they are; nothing finite becomes infinite, also to nearest even (unlike in torch): it becomes the largest
    finite value. NaN stays NaN; an infinity stays one in ``bf16`` and becomes the largest value in ``fp8``.

    Args:
        values: ``[n, width]`` fp32, contiguous. CPU tensors are rounded by compiled code, CUDA tensors by Triton.
        fields: Targets ``[n, ...]`` of :func:`megamem_kernels.formats.row_fields`, contiguous, on the same device.
        key: Names the stream of random bits; in ``[0, 2**64)``.
        step: Optimizer step.
        ids: ``[n]`` int64 logical row ids, contiguous, on the same device.

    Raises:
        ValueError: dtypes, shapes, devices or strides are others than these.
    """
    name = format_of(fields)
    count, width = values.shape
    require("values", values, torch.float32, (count, width), values.device)
    for field in row_fields(name, width):
        require(field.name, fields[field.name], field.dtype, (count, *field.shape), values.device)
    if ids is not None:
        require("ids", ids, torch.int64, (count,), values.device)
    if name == "fp32":
        fields[ROWS].copy_(values)
        return
    if values.is_cuda:
        from megamem_kernels.rounding.triton import quantize_rows_triton

        with torch.cuda.device(values.device):
            quantize_rows_triton(values, fields, key=key, step=step, ids=ids)
        return
    keyed = (_NEAREST if ids is None else ids.numpy(), np.uint64(key), np.uint64(step))
    source, rows = bits_of(values), bits_of(fields[ROWS])
    grain = max(1, _GRAIN_ELEMENTS // max(1, width))
    if name == "bf16":
        for_ranges(lambda low, high: quantize_bf16(source, rows, *keyed, low, high), count, grain=grain)
    else:
        scales = bits_of(fields[SCALES])
        for_ranges(lambda low, high: quantize_fp8(source, rows, scales, *keyed, low, high), count, grain=grain)
