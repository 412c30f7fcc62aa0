"""Squared norms of rows: the definition."""

from __future__ import annotations

from torch import Tensor


def row_squares(values: Tensor) -> Tensor:
    """``[n, width]`` to the sum of squares of each row, ``[n]`` float64."""
    return values.double().square().sum(1)
