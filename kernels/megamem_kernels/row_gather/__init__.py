"""Rows of a table by index: copied as they are, put back, or decoded to fp32 or bf16."""

from megamem_kernels.row_gather.op import copy_rows, dequantize_rows, gather_rows, scatter_rows

__all__ = ["copy_rows", "dequantize_rows", "gather_rows", "scatter_rows"]
