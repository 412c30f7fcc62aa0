"""Optimizer updates of touched rows: the definitions, in plain torch.

Arguments are those of the ops; a row in bf16 or fp8 is decoded, updated in fp32, and rounded by the reference of rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamem_kernels.formats import FP8_BLOCK, ROWS, SCALES, format_of, row_fields
from megamem_kernels.rounding.reference import quantize_rows
from megamem_kernels.row_update.touched import TouchedRows, TouchedState


def sgd_(rows: TouchedRows, gradient: Tensor, *, lr: float, weight_decay: float, step: int) -> None:
    """``w = (1 - lr wd) w - lr g``."""
    _replace(rows, _values(rows) * (1 - lr * weight_decay) - lr * gradient, step)


def add_scaled_(rows: TouchedRows, delta: Tensor, *, alpha: float, weight_decay: float, lr: float, step: int) -> None:
    """``w = (1 - lr wd) w + alpha delta``."""
    _replace(rows, _values(rows) * (1 - lr * weight_decay) + alpha * delta, step)


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
    """``a += mean(g^2)``; ``w = (1 - lr wd) w - lr g / (sqrt(a) + epsilon)``."""
    a = state.arrays["accumulator"][state.slots] + gradient.square().mean(dim=1)
    state.arrays["accumulator"][state.slots] = a
    move = lr * gradient / (a.sqrt() + epsilon)[:, None]
    _replace(rows, _values(rows) * (1 - lr * weight_decay) - move, step)


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
    """Adam on touched rows, moments decayed over the steps a row missed; the second moment is per row where its array is."""
    slots, arrays = state.slots, state.arrays
    gap = (step - arrays["last_step"][slots]).double()[:, None]
    m = arrays["exp_avg"][slots] * (beta1**gap).float() + (1 - beta1) * gradient
    if arrays["exp_avg_sq"].dim() == 1:
        squares = gradient.square().mean(dim=1, keepdim=True)
        v = arrays["exp_avg_sq"][slots][:, None] * (beta2**gap).float() + (1 - beta2) * squares
        arrays["exp_avg_sq"][slots] = v[:, 0]
    else:
        v = arrays["exp_avg_sq"][slots] * (beta2**gap).float() + (1 - beta2) * gradient.square()
        arrays["exp_avg_sq"][slots] = v
    arrays["exp_avg"][slots] = m
    arrays["last_step"][slots] = torch.tensor(step, dtype=torch.int32)
    denominator = (v / (1 - beta2**step)).sqrt() + epsilon
    _replace(rows, _values(rows) * (1 - lr * weight_decay) - lr * m / (1 - beta1**step) / denominator, step)


partial_rowwise_adam_ = lazy_adam_


def momentum_(state: TouchedState, gradient: Tensor, *, beta: float, step: int) -> Tensor:
    """``M = beta^gap M + (1 - beta) g``; the result is ``beta M + (1 - beta) g``."""
    slots, arrays = state.slots, state.arrays
    gap = (step - arrays["last_step"][slots]).double()[:, None]
    momentum = arrays["momentum_buffer"][slots] * (beta**gap).float() + (1 - beta) * gradient
    arrays["momentum_buffer"][slots] = momentum
    arrays["last_step"][slots] = torch.tensor(step, dtype=torch.int32)
    return beta * momentum + (1 - beta) * gradient


def _values(rows: TouchedRows) -> Tensor:
    values = rows.fields[ROWS][rows.slots].float()
    if SCALES in rows.fields:
        scales = 2.0 ** (rows.fields[SCALES][rows.slots].float() - 127)
        values *= scales.repeat_interleave(FP8_BLOCK, dim=1)[:, : values.shape[1]]
    return values


def _replace(rows: TouchedRows, values: Tensor, step: int) -> None:
    name = format_of(rows.fields)
    fields = {ROWS: values}
    if name != "fp32":
        fields = {field.name: field.allocate(len(values)) for field in row_fields(name, values.shape[1])}
        quantize_rows(values, fields, key=rows.key, step=step, ids=rows.ids)
    for key, field in fields.items():
        rows.fields[key][rows.slots] = field
