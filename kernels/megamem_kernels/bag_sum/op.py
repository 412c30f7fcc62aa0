"""Weighted sums of the rows of bags: what ``nn.EmbeddingBag(mode="sum", per_sample_weights=...)`` does, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamem_kernels.bag_sum import cpu
from megamem_kernels.elements import elements
from megamem_kernels.formats import require


def weighted_bag(rows: Tensor, index: Tensor, weights: Tensor, *, gradient: Tensor | None = None) -> Tensor:
    """``result[b]`` is the sum of ``weights[b, j] * rows[index[b, j]]`` over ``j``, added in fp32 for ascending ``j``.

    The backward pass adds the gradient of ``rows`` straight to ``rows.grad``, in fp32 and for ascending ``(b, j)``, so that
    nothing of the size of a working set is allocated for every micro-batch; for any number of threads it is the same bit for
    bit. Where ``rows.grad`` is None, it becomes ``gradient``.

    Args:
        rows: ``[unique, width]`` fp32 or bf16, contiguous; a leaf where it requires a gradient (a working set).
        index: ``[bags, j]`` int64 in ``[0, unique)``.
        weights: ``[bags, j]``, any floating dtype; used in fp32. Gets a gradient ``<d result[b], rows[index[b, j]]>``.

        gradient: Memory for ``rows.grad``, like ``rows``, with any content: what persists from step to step is not paged in
            again. None allocates it.

    Returns:
        ``[bags, width]`` of the dtype of ``rows``.

    Raises:
        ValueError: wrong shapes, dtypes or devices; on the CPU also an index out of range (on CUDA nothing checks).
    """
    if rows.dtype not in (torch.float32, torch.bfloat16) or rows.dim() != 2 or not rows.is_contiguous():
        raise ValueError(f"rows are {rows.dtype} {list(rows.shape)}, not contiguous fp32 or bf16 [unique, width]")
    if index.dtype != torch.int64 or index.dim() != 2 or weights.shape != index.shape:
        raise ValueError(
            f"index is {index.dtype} {list(index.shape)} and weights are {list(weights.shape)}, not int64 and [bags, j] both"
        )
    if not rows.device == index.device == weights.device:
        raise ValueError(f"rows on {rows.device}, index on {index.device}, weights on {weights.device}")
    if rows.requires_grad and not rows.is_leaf:
        raise ValueError("rows are not a leaf: their gradient would be lost")
    if gradient is not None:
        require("gradient", gradient, rows.dtype, tuple(rows.shape), rows.device)
    return _WeightedBag.apply(rows, index, weights, gradient)


class _WeightedBag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weights: Tensor, row_gradient: Tensor | None) -> Tensor:
        index, factors = index.contiguous(), weights.detach().float().contiguous()
        ctx.rows, ctx.row_gradient, ctx.weights_dtype = rows, row_gradient, weights.dtype
        ctx.save_for_backward(index, factors)
        out = rows.new_empty(len(index), rows.shape[1])
        if rows.device.type == "cpu":
            cpu.forward(elements(rows), index.numpy(), factors.numpy(), elements(out))
        else:
            from megamem_kernels.bag_sum import triton

            with torch.cuda.device(rows.device):
                triton.forward(rows.detach(), index, factors, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor | None, None]:
        rows, (index, factors) = ctx.rows, ctx.saved_tensors
        want_rows, _, want_weights, _ = ctx.needs_input_grad
        accumulate = want_rows and rows.grad is not None
        if want_rows and not accumulate:
            rows.grad = torch.empty_like(rows) if ctx.row_gradient is None else ctx.row_gradient
        row_gradient = rows.grad if want_rows else None
        weight_gradient = torch.empty_like(factors) if want_weights else None
        gradient, values = gradient.contiguous(), rows.detach()
        if rows.device.type == "cpu":
            cpu.backward(
                elements(gradient),
                elements(values),
                index.numpy(),
                factors.numpy(),
                None if row_gradient is None else elements(row_gradient),
                accumulate,
                None if weight_gradient is None else weight_gradient.numpy(),
            )
        else:
            from megamem_kernels.bag_sum import triton

            with torch.cuda.device(rows.device):
                triton.backward(gradient, values, index, factors, row_gradient, accumulate, weight_gradient)
        return None, None, None if weight_gradient is None else weight_gradient.to(ctx.weights_dtype), None
