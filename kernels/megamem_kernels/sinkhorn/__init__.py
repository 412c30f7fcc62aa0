"""Sinkhorn balancing of a matrix of row gradients: its reductions."""

from megamem_kernels.sinkhorn.op import column_maxima, column_squares, row_norms

__all__ = ["column_maxima", "column_squares", "row_norms"]
