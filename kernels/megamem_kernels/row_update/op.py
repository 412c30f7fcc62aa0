"""Optimizer updates of touched rows, in place on tables in host memory.

Touched rows are worked through in blocks that stay in the cache, so temporary memory is a few blocks, whatever the size
of the table or the number of touched rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 16
"""Elements of one block: several fp32 temporaries of this size fit a second-level cache."""


def rowwise_adagrad_(
    rows: Tensor,
    accumulator: Tensor,
    index: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """Row-wise Adagrad (one accumulator per row) on touched rows, in place.

    ``a += mean(g^2)``; ``w = (1 - lr wd) w - lr g / (sqrt(a) + epsilon)``: the rule that FBGEMM calls
    ``EXACT_ROWWISE_ADAGRAD``, with decoupled weight decay.

    Args:
        rows: ``[n, width]`` fp32, changed at ``index``.
        accumulator: ``[n]`` fp32, sum of mean squared gradients, changed at ``index``.
        index: ``[u]`` int64, distinct rows.
        gradient: ``[u, width]`` fp32, already summed over every use of a row.
        lr: Learning rate of this step.
        epsilon: Added to the root.
        weight_decay: Decoupled; a row decays only in the steps that touch it.
    """
    for block, g in _blocks(index, gradient):
        a = accumulator.index_select(0, block).add_(g.square().mean(dim=1))
        accumulator.index_copy_(0, block, a)
        w = rows.index_select(0, block).mul_(1 - lr * weight_decay)
        rows.index_copy_(0, block, w.addcdiv_(g, a.sqrt_().add_(epsilon)[:, None], value=-lr))


def lazy_adam_(
    rows: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    index: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
) -> None:
    """Adam on touched rows, in place; the moments of a row catch up on the steps it missed.

    With ``gap = step - last_step``: ``m = beta1^gap m + (1 - beta1) g``, ``v = beta2^gap v + (1 - beta2) g^2``, then the
    usual ``w = (1 - lr wd) w - lr m^ / (sqrt(v^) + epsilon)`` with bias corrections ``1 - beta^step``. A touched row has
    exactly the moments of dense Adam that saw zero gradients in between, and makes exactly the move that dense Adam makes
    in this step. What it does *not* make are the moves of the steps that missed it: dense Adam (``torch.optim.Adam``) keeps
    moving and decaying a weight whose gradient is zero, while here an untouched row never changes. The two are the same
    where every row is touched in every step.

    Args:
        rows: ``[n, width]`` fp32, changed at ``index``.
        exp_avg: ``[n, width]`` fp32 first moments as of ``last_step``, changed at ``index``.
        exp_avg_sq: ``[n, width]`` fp32 second moments as of ``last_step``, changed at ``index``.
        last_step: ``[n]`` int32 step that touched a row last, 0 where none did, set to ``step`` at ``index``.
        index: ``[u]`` int64, distinct rows.
        gradient: ``[u, width]`` fp32, already summed over every use of a row.
        lr: Learning rate of this step.
        beta1: Decay of the first moment per step.
        beta2: Decay of the second moment per step.
        epsilon: Added to the root, after bias correction.
        weight_decay: Decoupled; a row decays only in the steps that touch it.
        step: Number of this optimizer step, counted from 1.

    Raises:
        ValueError: ``step`` is not later than the last step of every touched row.
    """
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for block, g in _blocks(index, gradient):
        gap = step - last_step.index_select(0, block)
        if int(gap.min()) < 1:
            raise ValueError(f"step {step} is not later than the last update of a row (step {step - int(gap.min())})")
        gap = gap.double()[:, None]
        m = exp_avg.index_select(0, block).mul_(torch.pow(beta1, gap).float()).add_(g, alpha=1 - beta1)
        v = exp_avg_sq.index_select(0, block).mul_(torch.pow(beta2, gap).float()).addcmul_(g, g, value=1 - beta2)
        exp_avg.index_copy_(0, block, m)
        exp_avg_sq.index_copy_(0, block, v)
        last_step.index_fill_(0, block, step)
        w = rows.index_select(0, block).mul_(1 - lr * weight_decay)
        rows.index_copy_(0, block, w.addcdiv_(m, v.div_(correction2).sqrt_().add_(epsilon), value=-lr / correction1))


def _blocks(index: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if not len(index):
        return iter(())
    size = max(1, BLOCK_ELEMENTS // gradient.shape[1])
    return zip(index.split(size), gradient.split(size), strict=True)
