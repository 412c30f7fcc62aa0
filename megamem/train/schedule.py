"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megamem.memory.config import RowOptimizerConfig
from megamem.train.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) in a run of ``total_steps``.

    Linear warm-up to ``lr``; then ``constant``, ``cosine`` (half a cosine to ``lr * min_lr_ratio``), or ``wsd``
    (warm-up, stable, and a linear decay over the last ``decay_steps``; arXiv 2404.06395, section 4). The decay starts
    when the warm-up has ended, at the earliest.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        end = config.decay_steps or total_steps
        progress = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
        return floor + (config.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay = max(1, min(config.decay_steps or total_steps // 10, total_steps - config.warmup_steps))
    start = total_steps - decay
    progress = min(1.0, max(0.0, (step + 1 - start) / decay))
    return config.lr + (floor - config.lr) * progress


def row_learning_rate(rows: RowOptimizerConfig, dense: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of table rows in optimizer step ``step`` (from 0): a multiple of the dense rate of the step, or of its
    peak with ``schedule=constant``; the multiple goes linearly from ``lr_multiplier`` to ``final_lr_multiplier``."""
    multiplier = rows.lr_multiplier
    if rows.final_lr_multiplier >= 0:
        multiplier += (rows.final_lr_multiplier - multiplier) * min(1.0, step / max(1, total_steps - 1))
    return multiplier * (dense.lr if rows.schedule == "constant" else learning_rate(dense, step, total_steps))
