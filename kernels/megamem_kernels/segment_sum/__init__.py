"""Deterministic sums of rows that share a key."""

from megamem_kernels.segment_sum.op import segment_sum

__all__ = ["segment_sum"]
