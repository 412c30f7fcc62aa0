"""Initial rows as a function of key, row and element."""

from megamem_kernels.initialize.op import normal_rows

__all__ = ["normal_rows"]
