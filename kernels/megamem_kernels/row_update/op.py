"""Optimizer updates of touched rows, in place on tables of any row format.

A touched row is read and written once, with its state; nothing of the size of a table is allocated. Rows in bf16 and fp8 are
rounded stochastically (:mod:`megamem_kernels.rounding.op`) with bits that are a function of key, step, row id and element.

All of them raise ValueError where shapes, dtypes or devices do not fit each other, with the tensor's name. Slots are not
checked: distinct and in range is the caller's duty. Tensors are contiguous and on one device; beside CUDA tensors, others may
lie in pinned host memory.

**Missed steps.** A row that no step touches changes in nothing: it neither moves nor decays, and weight decay counts only the
steps that touch it. State that decays per step does so by ``beta ** gap``, ``gap = step - last_step``, when its row is touched
again: as if the gradients of the missed steps had been zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megamem_kernels.parallel import for_ranges
from megamem_kernels.row_update import cpu
from megamem_kernels.row_update.storage import stored
from megamem_kernels.row_update.touched import TouchedRows, TouchedState, check

_GRAIN = 1 << 14  # elements worth a thread
_POWERS = 1024


def sgd_(rows: TouchedRows, gradient: Tensor, *, lr: float, weight_decay: float, step: int) -> None:
    """Plain gradient descent: ``w = (1 - lr wd) w - lr g``.

    Args:
        rows: What to change.
        gradient: ``[u, width]`` fp32, already summed over every use of a row.
        lr: Learning rate of this step.
        weight_decay: Decoupled.
        step: Number of this optimizer step, counted from 1.
    """
    add_scaled_(rows, gradient, alpha=-lr, weight_decay=weight_decay, lr=lr, step=step)


def add_scaled_(rows: TouchedRows, delta: Tensor, *, alpha: float, weight_decay: float, lr: float, step: int) -> None:
    """``w = (1 - lr wd) w + alpha delta``: the last stage of rules that find the direction of a step themselves.

    Args:
        rows: What to change.
        delta: ``[u, width]`` fp32.
        alpha: Factor of ``delta``; negative where it is a direction of ascent.
        weight_decay: Decoupled.
        lr: Learning rate of this step, for weight decay alone.
        step: Number of this optimizer step, counted from 1.
    """
    check(delta, rows)
    kept = 1 - lr * weight_decay
    if delta.is_cuda:
        from megamem_kernels.row_update import triton

        with torch.cuda.device(delta.device):
            triton.add_scaled(rows, delta, alpha, kept, step)
        return
    table, update, scalars = stored(rows, step), delta.detach().numpy(), _fp32(alpha, kept)
    _run(lambda low, high: cpu.add_scaled(low, high, table, update, *scalars), delta)


def rowwise_adagrad_(
    rows: TouchedRows,
    state: TouchedState,
    gradient: Tensor,
    *,
    lr: float,
    epsilon: float,
    weight_decay: float,
    step: int,
) -> None:
    """Row-wise Adagrad: ``a += mean(g^2)``; ``w = (1 - lr wd) w - lr g / (sqrt(a) + epsilon)``.

    The rule that FBGEMM calls ``EXACT_ROWWISE_ADAGRAD``, with decoupled weight decay.

    Args:
        rows: What to change.
        state: ``accumulator`` fp32 ``[slots]``.
        gradient: ``[u, width]`` fp32, already summed over every use of a row.
        lr: Learning rate of this step.
        epsilon: Added to the root.
        weight_decay: Decoupled.
        step: Number of this optimizer step, counted from 1.
    """
    check(gradient, rows, state, accumulator=(torch.float32, False))
    kept = 1 - lr * weight_decay
    if gradient.is_cuda:
        from megamem_kernels.row_update import triton

        with torch.cuda.device(gradient.device):
            triton.rowwise_adagrad(rows, state, gradient, lr, epsilon, kept, step)
        return
    table, g, scalars = stored(rows, step), gradient.detach().numpy(), _fp32(lr, epsilon, kept)
    slots, accumulator = state.slots.numpy(), state.arrays["accumulator"].numpy()
    _run(lambda low, high: cpu.rowwise_adagrad(low, high, table, slots, accumulator, g, *scalars), gradient)


def lazy_adam_(
    rows: TouchedRows,
    state: TouchedState,
    gradient: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
) -> None:
    """Adam on touched rows; the moments of a row catch up on the steps it missed.

    With ``gap = step - last_step``: ``m = beta1^gap m + (1 - beta1) g``, ``v = beta2^gap v + (1 - beta2) g^2``, then the
    usual ``w = (1 - lr wd) w - lr m^ / (sqrt(v^) + epsilon)`` with bias corrections ``1 - beta^step``. A touched row has
    exactly the moments of dense Adam that saw zero gradients in between, and makes exactly the move that dense Adam makes
    in this step. What it does *not* make are the moves of the steps that missed it: dense Adam (``torch.optim.Adam``) keeps
    moving and decaying a weight whose gradient is zero, while here an untouched row never changes. The two are the same
    where every row is touched in every step.

    Args:
        rows: What to change.
        state: ``exp_avg`` and ``exp_avg_sq`` fp32 ``[slots, width]``, the moments as of ``last_step`` int32 ``[slots]``,
            the step that touched a row last, 0 where none did.
        gradient: ``[u, width]`` fp32, already summed over every use of a row.
        lr: Learning rate of this step.
        beta1: Decay of the first moment per step.
        beta2: Decay of the second moment per step.
        epsilon: Added to the root, after bias correction.
        weight_decay: Decoupled.
        step: Number of this optimizer step, counted from 1.

    Raises:
        ValueError: ``step`` is not later than the last step of every touched row; rows of which it is have been updated
            (CPU only: on CUDA nothing checks).
    """
    _adam(rows, state, gradient, True, lr, beta1, beta2, epsilon, weight_decay, step)


def partial_rowwise_adam_(
    rows: TouchedRows,
    state: TouchedState,
    gradient: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
) -> None:
    """Adam with one second moment per row: :func:`lazy_adam_` where ``v = beta2^gap v + (1 - beta2) mean(g^2)``.

    The rule that FBGEMM calls ``PARTIAL_ROWWISE_ADAM``, with moments that catch up. Arguments as there, but ``exp_avg_sq``
    is fp32 ``[slots]``.
    """
    _adam(rows, state, gradient, False, lr, beta1, beta2, epsilon, weight_decay, step)


def momentum_(state: TouchedState, gradient: Tensor, *, beta: float, step: int) -> Tensor:
    """Nesterov's momentum as in Muon: ``M = beta^gap M + (1 - beta) g``; the result is ``beta M + (1 - beta) g``.

    Args:
        state: ``momentum_buffer`` fp32 ``[slots, width]`` as of ``last_step`` int32 ``[slots]``; changed at ``slots``.
        gradient: ``[u, width]`` fp32, already summed over every use of a row.
        beta: Decay of the momentum per step.
        step: Number of this optimizer step, counted from 1.

    Returns:
        ``[u, width]`` fp32.

    Raises:
        ValueError: as :func:`lazy_adam_`.
    """
    check(gradient, None, state, momentum_buffer=(torch.float32, True), last_step=(torch.int32, False))
    out = torch.empty_like(gradient)
    if gradient.is_cuda:
        from megamem_kernels.row_update import triton

        with torch.cuda.device(gradient.device):
            triton.momentum(state, gradient, beta, step, out)
        return out
    slots, powers, g, result = state.slots.numpy(), _powers(beta), gradient.detach().numpy(), out.numpy()
    buffer, last = state.arrays["momentum_buffer"].numpy(), state.arrays["last_step"].numpy()
    late: list[int] = []
    _run(lambda low, high: late.append(cpu.momentum(low, high, slots, buffer, last, g, powers, step, result)), gradient)
    _refuse(late, step)
    return out


def _adam(
    rows: TouchedRows,
    state: TouchedState,
    gradient: Tensor,
    per_element: bool,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
) -> None:
    moments = {"exp_avg": (torch.float32, True), "exp_avg_sq": (torch.float32, per_element)}
    check(gradient, rows, state, last_step=(torch.int32, False), **moments)
    rate, root, kept = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), 1 - lr * weight_decay
    if gradient.is_cuda:
        from megamem_kernels.row_update import triton

        with torch.cuda.device(gradient.device):
            triton.adam(rows, state, gradient, rate, beta1, beta2, root, epsilon, kept, step)
        return
    width, table, slots, g = gradient.shape[1], stored(rows, step), state.slots.numpy(), gradient.detach().numpy()
    first, second, last = (state.arrays[name].numpy() for name in ("exp_avg", "exp_avg_sq", "last_step"))
    second = second.reshape(len(last), width if per_element else 1)
    powers1, powers2, scalars = _powers(beta1), _powers(beta2), _fp32(rate, root, epsilon, kept)
    late: list[int] = []

    def run(low: int, high: int) -> None:
        late.append(cpu.lazy_adam(low, high, table, slots, first, second, last, g, powers1, powers2, *scalars, step))

    _run(run, gradient)
    _refuse(late, step)


def _run(function: Callable[[int, int], None], gradient: Tensor) -> None:
    count, width = gradient.shape
    for_ranges(function, count, grain=max(1, _GRAIN // max(1, width)))


def _refuse(late: list[int], step: int) -> None:
    if late and max(late) >= 0:
        raise ValueError(f"step {step} is not later than the last update of a row (step {max(late)})")


def _fp32(*values: float) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, values))


@lru_cache(maxsize=16)
def _powers(beta: float) -> np.ndarray:
    """``beta ** [0, 1, ...]`` float64."""
    return np.power(np.float64(beta), np.arange(_POWERS))
