"""Reductions of a matrix with scales on its rows and columns, compiled."""

from __future__ import annotations

import numpy as np
from numba import float64, int64

from megamem_kernels.jit import njit


@njit(nogil=True, cache=True, error_model="numpy")
def row_norms(matrix: np.ndarray, columns: np.ndarray, out: np.ndarray, low: int, high: int) -> None:
    """Rows ``[low, high)``: added from left to right."""
    for i in range(low, high):
        total = 0.0
        for j in range(matrix.shape[1]):
            x = float64(matrix[i, j]) * columns[j]
            total += x * x
        out[i] = np.sqrt(total)


@njit(nogil=True, cache=True, error_model="numpy")
def column_maxima(
    matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, out: np.ndarray, low: int, high: int
) -> None:
    """Raise ``out`` to the magnitudes of rows ``[low, high)``."""
    for i in range(low, high):
        for j in range(matrix.shape[1]):
            out[j] = max(out[j], abs(float64(matrix[i, j]) * rows[i] * columns[j]))


@njit(nogil=True, cache=True, error_model="numpy")
def column_squares(
    matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, factor: float, out: np.ndarray, low: int, high: int
) -> None:
    """Add rows ``[low, high)`` to ``out``: whole numbers, whose sum does not depend on order."""
    for i in range(low, high):
        for j in range(matrix.shape[1]):
            x = float64(matrix[i, j]) * rows[i] * columns[j]
            out[j] += int64(x * x * factor)
