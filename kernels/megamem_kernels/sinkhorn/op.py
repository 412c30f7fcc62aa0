"""The reductions of Sinkhorn balancing, which alternates between scaling the rows and the columns of a matrix.

The scaled matrix is never written: one scale per row and one per column stand for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megamem_kernels.parallel import for_ranges
from megamem_kernels.sinkhorn import cpu, reference

_GRAIN_ELEMENTS = 1 << 16


def row_norms(matrix: Tensor, columns: Tensor) -> Tensor:
    """Euclidean norm of each row of ``matrix * columns``.

    Args:
        matrix: ``[n, width]`` fp32.
        columns: ``[width]`` float64.

    Returns:
        ``[n]`` float64, a function of the row and ``columns`` alone on a CPU.
    """
    if matrix.device.type != "cpu":
        return reference.row_norms(matrix, columns)
    out = torch.empty(len(matrix), dtype=torch.float64)
    arrays = matrix.contiguous().numpy(), columns.numpy(), out.numpy()
    for_ranges(lambda low, high: cpu.row_norms(*arrays, low, high), len(matrix), grain=_grain(matrix))
    return out


def column_maxima(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Largest magnitude in each column of ``rows[:, None] * matrix * columns``.

    Args:
        matrix: ``[n, width]`` fp32.
        rows: ``[n]`` float64.
        columns: ``[width]`` float64.

    Returns:
        ``[width]`` float64, 0 where ``n`` is 0.
    """
    if matrix.device.type != "cpu":
        return reference.column_maxima(matrix, rows, columns)
    arrays = matrix.contiguous().numpy(), rows.numpy(), columns.numpy()
    return _reduce(matrix, np.float64, np.maximum, lambda out, low, high: cpu.column_maxima(*arrays, out, low, high))


def column_squares(matrix: Tensor, rows: Tensor, columns: Tensor, *, bits: int) -> Tensor:
    """Sum of squares of each column of ``rows[:, None] * matrix * columns``, in units of ``2 ** -bits``.

    Every square is cut to a whole number of these units, so the sum is exact: the same for any order of rows, and for any
    cut of them into parts whose sums are added.

    Args:
        matrix: ``[n, width]`` fp32.
        rows: ``[n]`` float64.
        columns: ``[width]`` float64, such that no magnitude of the scaled matrix is above 1.
        bits: At most ``62 - log2(n)``, for the ``n`` of all parts together.

    Returns:
        ``[width]`` int64.
    """
    if matrix.device.type != "cpu":
        return reference.column_squares(matrix, rows, columns, bits)
    arrays = matrix.contiguous().numpy(), rows.numpy(), columns.numpy()
    return _reduce(
        matrix, np.int64, np.add, lambda out, low, high: cpu.column_squares(*arrays, 2.0**bits, out, low, high)
    )


def _reduce(matrix: Tensor, dtype: type, combine: np.ufunc, function: Callable[[np.ndarray, int, int], None]) -> Tensor:
    """Combine what ``function`` makes of ranges of rows, in whatever order they end."""
    total: np.ndarray = np.zeros(matrix.shape[1], dtype=dtype)
    lock = threading.Lock()

    def add(low: int, high: int) -> None:
        part = np.zeros_like(total)
        function(part, low, high)
        with lock:
            combine(total, part, out=total)

    for_ranges(add, len(matrix), grain=_grain(matrix))
    return torch.from_numpy(total)


def _grain(matrix: Tensor) -> int:
    return max(1, _GRAIN_ELEMENTS // matrix.shape[1])
