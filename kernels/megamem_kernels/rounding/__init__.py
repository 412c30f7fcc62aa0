"""Rounding of fp32 rows to the formats that tables are stored in."""

from megamem_kernels.rounding.op import quantize_rows

__all__ = ["quantize_rows"]
