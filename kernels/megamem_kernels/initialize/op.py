"""Initial rows: validation."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from megamem_kernels.initialize.cpu import fill_normal
from megamem_kernels.initialize.reference import TRUNCATION
from megamem_kernels.parallel import for_ranges

_GRAIN_VALUES = 1 << 17
_BELOW = NormalDist().cdf(-TRUNCATION)


def normal_rows(
    out: Tensor, rows: np.ndarray, *, key: int, first_element: int = 0, std: float, truncated: bool = False
) -> None:
    """Fill ``out`` with normal values of mean 0 that are functions of (key, row, element) alone.

    Element ``e`` of a row takes 32 bits ``b`` of :mod:`megamem_kernels.random`: half ``e % 2``, low half first, of
    ``word(row_key(key, 0, row), e // 2)``. Its value is ``std * quantile((b + 1/2) / 2**32)``, to 3e-7 of its size, the same
    bits on every machine. ``truncated`` maps the probability into that between two standard deviations instead: the
    distribution that drawing again whatever lies beyond would give, without drawing again.

    Args:
        out: ``[n, width]`` fp32 on the CPU, its rows contiguous (a range of columns of a wider table will do); overwritten.
        rows: ``[n]`` int64 logical rows, in any order.
        key: From :func:`megamem_kernels.random.key_of`, in ``[0, 2**64)``.
        first_element: Element that column 0 of ``out`` is. A row that is filled in parts gets the values of one filled whole.
        std: Standard deviation before truncation.
        truncated: Draw between two standard deviations only.

    Raises:
        ValueError: ``out`` is not of the stated form, or does not fit ``rows``.
    """
    if out.ndim != 2 or out.dtype != torch.float32 or out.device.type != "cpu" or len(rows) != out.shape[0]:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device} for {len(rows)} rows")
    count, width = out.shape
    if not count or not width:
        return
    if (width > 1 and out.stride(1) != 1) or (count > 1 and out.stride(0) < width):
        raise ValueError(f"out has strides {out.stride()}; its rows must be contiguous and apart")
    stride = out.stride(0) if count > 1 else width
    arguments = (
        out.as_strided(((count - 1) * stride + width,), (1,)).numpy(),
        stride,
        width,
        np.ascontiguousarray(rows, dtype=np.int64),
        np.uint64(key),
        first_element,
        _BELOW if truncated else 0.0,
        1.0 - 2.0 * _BELOW if truncated else 1.0,
        float(std),
    )
    for_ranges(lambda low, high: fill_normal(*arguments, low, high), count, grain=max(1, _GRAIN_VALUES // width))
