"""Optimizer updates of touched rows: the definitions, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Row-wise Adagrad: ``a += mean(g^2)``, ``w = (1 - lr wd) w - lr g / (sqrt(a) + epsilon)``; see the op."""
    a = accumulator[index] + gradient.square().mean(dim=1)
    accumulator[index] = a
    rows[index] = rows[index] * (1 - lr * weight_decay) - lr * gradient / (a.sqrt() + epsilon)[:, None]


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
    """Adam on touched rows, moments decayed over the steps a row missed; see the op."""
    gap = (step - last_step[index]).double()[:, None]
    m = exp_avg[index] * (beta1**gap).float() + (1 - beta1) * gradient
    v = exp_avg_sq[index] * (beta2**gap).float() + (1 - beta2) * gradient.square()
    exp_avg[index], exp_avg_sq[index] = m, v
    last_step[index] = torch.tensor(step, dtype=last_step.dtype)
    denominator = (v / (1 - beta2**step)).sqrt() + epsilon
    rows[index] = rows[index] * (1 - lr * weight_decay) - lr * m / (1 - beta1**step) / denominator
