"""Squared norms of rows."""

from megamem_kernels.row_squares.op import row_squares

__all__ = ["row_squares"]
