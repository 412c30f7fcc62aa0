"""Weighted sums of the rows of bags."""

from megamem_kernels.bag_sum.op import weighted_bag

__all__ = ["weighted_bag"]
