"""Weighted sums of the rows of bags: the definition, in plain torch."""

from __future__ import annotations

from torch import Tensor


def weighted_bag(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``result[b]`` is the sum of ``weights[b, j] * rows[index[b, j]]`` over ``j``, in fp32; differentiable.

    ``rows`` ``[unique, width]``, ``index`` and ``weights`` ``[bags, j]``; result ``[bags, width]`` of the dtype of ``rows``.
    """
    return (weights.float()[:, :, None] * rows.float()[index]).sum(dim=1).to(rows.dtype)
