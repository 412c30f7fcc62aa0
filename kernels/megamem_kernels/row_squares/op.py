"""Squared norms of rows, with nothing of their size allocated."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megamem_kernels.jit import njit
from megamem_kernels.parallel import for_ranges
from megamem_kernels.row_squares.reference import row_squares as reference

_GRAIN = 4096


@njit(nogil=True, cache=True, error_model="numpy")
def _row_squares(values: np.ndarray, out: np.ndarray, low: int, high: int) -> None:
    for i in range(low, high):
        total = 0.0
        for j in range(values.shape[1]):
            x = np.float64(values[i, j])
            total += x * x
        out[i] = total


def row_squares(values: Tensor) -> np.ndarray:
    """Sum of squares of each row, added from left to right in float64.

    Args:
        values: ``[n, width]`` fp32.

    Returns:
        ``[n]`` float64 on the host.
    """
    if values.device.type != "cpu":
        return reference(values).cpu().numpy()
    array = values.detach().contiguous().numpy()
    out = np.empty(len(array), dtype=np.float64)
    for_ranges(lambda low, high: _row_squares(array, out, low, high), len(array), grain=_GRAIN)
    return out
