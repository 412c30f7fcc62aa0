"""Distinct row ids and where each lookup finds its own."""

from megamem_kernels.unique.op import unique

__all__ = ["unique"]
