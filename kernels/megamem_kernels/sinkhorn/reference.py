"""Reductions of a matrix with scales on its rows and columns: the definitions, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norms(matrix: Tensor, columns: Tensor) -> Tensor:
    """``[n]`` float64; see the op."""
    return (matrix.double() * columns).square().sum(dim=1).sqrt()


def column_maxima(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``[width]`` float64; see the op."""
    scaled = (matrix.double() * rows[:, None] * columns).abs()
    return scaled.amax(dim=0) if len(matrix) else torch.zeros_like(columns)


def column_squares(matrix: Tensor, rows: Tensor, columns: Tensor, bits: int) -> Tensor:
    """``[width]`` int64; see the op."""
    scaled = (matrix.double() * rows[:, None] * columns).square()
    return (scaled * 2.0**bits).to(torch.int64).sum(dim=0)
