"""Row optimizers by name: the state each keeps per row, and its update of touched rows.

A new one is a class with ``state_fields`` and ``update``, entered in :data:`ROW_OPTIMIZERS` and in the literal of
``memory.optimizer.name``. All leave rows that no step touches, and their state, as they are; what a row does about the
steps that missed it is said at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.memory.config import RowOptimizerConfig
from megamem.memory.norm import order_free_sum
from megamem.memory.table import OwnedTable
from megamem_kernels.formats import Field
from megamem_kernels.row_update import (
    TouchedRows,
    TouchedState,
    add_scaled_,
    lazy_adam_,
    momentum_,
    partial_rowwise_adam_,
    rowwise_adagrad_,
    sgd_,
)
from megamem_kernels.sinkhorn import column_maxima, column_squares, row_norms

_LAST_STEP = Field("last_step", torch.int32, ())
_RMS = 0.18
_NEGLIGIBLE = 1e-3
_EPSILON = 1e-20
_BALANCE_ROWS = 4096


class RowOptimizer(Protocol):
    """Updates touched rows; rows that no step touches and their state never change."""

    def state_fields(self, width: int) -> tuple[Field, ...]:
        """What it keeps for every row of a table of this width; zero before the first update."""
        ...

    def update(
        self,
        table: OwnedTable,
        local: np.ndarray,
        gradient: Tensor,
        *,
        lr: float,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Change rows and state of ``table`` in place. Collective over ``group``.

        Args:
            table: Made with the state fields of this optimizer.
            local: ``[u]`` int64, distinct rows counted from ``table.start``.
            gradient: ``[u, width]`` fp32, summed over every use of a row in the step.
            lr: Learning rate of rows in this step.
            step: Number of this optimizer step, counted from 1.
            group: gloo group of all owners of the table; None where there is one.
        """
        ...


class Sgd:
    """Plain gradient descent, no state: ``w = (1 - lr wd) w - lr g``. A missed step has no effect, now or later."""

    def __init__(self, config: RowOptimizerConfig) -> None:
        self._config = config

    def state_fields(self, width: int) -> tuple[Field, ...]:
        """Nothing."""
        return ()

    def update(
        self,
        table: OwnedTable,
        local: np.ndarray,
        gradient: Tensor,
        *,
        lr: float,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """See :meth:`RowOptimizer.update`."""

        def rule(rows: TouchedRows, state: TouchedState, gradient: Tensor) -> None:
            sgd_(rows, gradient, lr=lr, weight_decay=self._config.weight_decay, step=step)

        table.update(local, gradient, rule)


class RowwiseAdagrad:
    """:func:`megamem_kernels.row_update.rowwise_adagrad_`: 4 bytes of state per row. A missed step has no effect, now or
    later."""

    def __init__(self, config: RowOptimizerConfig) -> None:
        self._config = config

    def state_fields(self, width: int) -> tuple[Field, ...]:
        """The sum of mean squared gradients."""
        return (Field("accumulator", torch.float32, ()),)

    def update(
        self,
        table: OwnedTable,
        local: np.ndarray,
        gradient: Tensor,
        *,
        lr: float,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """See :meth:`RowOptimizer.update`."""
        config = self._config

        def rule(rows: TouchedRows, state: TouchedState, gradient: Tensor) -> None:
            rowwise_adagrad_(
                rows, state, gradient, lr=lr, epsilon=config.epsilon, weight_decay=config.weight_decay, step=step
            )

        table.update(local, gradient, rule)


class LazyAdam:
    """:func:`megamem_kernels.row_update.lazy_adam_`: 8 bytes of state per element and 4 per row.

    Moments of a touched row first decay over the steps that missed it, as if its gradient had been zero in them; the moves
    and the weight decay of those steps are left out.
    """

    def __init__(self, config: RowOptimizerConfig) -> None:
        self._config = config

    def state_fields(self, width: int) -> tuple[Field, ...]:
        """Two moments per element, and the step of the last update."""
        return (Field("exp_avg", torch.float32, (width,)), Field("exp_avg_sq", torch.float32, (width,)), _LAST_STEP)

    def update(
        self,
        table: OwnedTable,
        local: np.ndarray,
        gradient: Tensor,
        *,
        lr: float,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """See :meth:`RowOptimizer.update`."""
        table.update(local, gradient, _adam_rule(lazy_adam_, self._config, lr, step))


class PartialRowwiseAdam:
    """:func:`megamem_kernels.row_update.partial_rowwise_adam_`: 4 bytes of state per element and 8 per row.

    Missed steps as in :class:`LazyAdam`.
    """

    def __init__(self, config: RowOptimizerConfig) -> None:
        self._config = config

    def state_fields(self, width: int) -> tuple[Field, ...]:
        """First moment per element, second moment per row, and the step of the last update."""
        return (Field("exp_avg", torch.float32, (width,)), Field("exp_avg_sq", torch.float32, ()), _LAST_STEP)

    def update(
        self,
        table: OwnedTable,
        local: np.ndarray,
        gradient: Tensor,
        *,
        lr: float,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """See :meth:`RowOptimizer.update`."""
        table.update(local, gradient, _adam_rule(partial_rowwise_adam_, self._config, lr, step))


def _adam_rule(
    function: Callable[..., None], config: RowOptimizerConfig, lr: float, step: int
) -> Callable[[TouchedRows, TouchedState, Tensor], None]:
    def rule(rows: TouchedRows, state: TouchedState, gradient: Tensor) -> None:
        function(
            rows,
            state,
            gradient,
            lr=lr,
            beta1=config.betas[0],
            beta2=config.betas[1],
            epsilon=config.epsilon,
            weight_decay=config.weight_decay,
            step=step,
        )

    return rule


class SinkhornMomentum:
    """Nesterov momentum whose step is balanced over rows and columns: 4 bytes of state per element and 4 per row.

    Algorithm 1 of the DeepSeek-V4.1 report, over the rows that the step touched on any owner; dense and lazy are the same
    where that is every row::

        M = beta M + (1 - beta) G;  N = beta M + (1 - beta) G
        rows of N with a norm of at most 0.001 of the mean norm become zero
        11 times, in turn: divide every row by its norm; divide every column by its norm
        W = (1 - lr wd) W - 0.18 lr sqrt(width) N

    The momentum of a touched row first decays over the steps that missed it, as if its gradient had been zero in them; the
    moves of those steps are left out. Sums over rows are exact (:func:`~megamem_kernels.sinkhorn.column_squares`,
    :func:`~megamem.memory.norm.order_free_sum`), so the result does not depend on owners or placement.
    """

    def __init__(self, config: RowOptimizerConfig) -> None:
        self._config = config

    def state_fields(self, width: int) -> tuple[Field, ...]:
        """The momentum, and the step of the last update."""
        return (Field("momentum_buffer", torch.float32, (width,)), _LAST_STEP)

    def update(
        self,
        table: OwnedTable,
        local: np.ndarray,
        gradient: Tensor,
        *,
        lr: float,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """See :meth:`RowOptimizer.update`."""
        config, width = self._config, table.spec.width
        pieces: list[Tensor] = []

        def momentum(rows: TouchedRows, state: TouchedState, gradient: Tensor) -> None:
            pieces.append(momentum_(state, gradient, beta=config.momentum, step=step))

        table.update(local, gradient, momentum)
        # One piece unless the tier holds less than the step touches; none where this owner has nothing of the step.
        direction = torch.cat(pieces) if len(pieces) > 1 else next(iter(pieces), gradient[:0])
        pieces.clear()
        rows, columns = sinkhorn_scales(direction, iterations=config.sinkhorn_iterations, group=group)
        for low in range(0, len(direction), _BALANCE_ROWS):
            part = direction[low : low + _BALANCE_ROWS]
            part.copy_(part.double() * rows[low : low + _BALANCE_ROWS, None] * columns)

        def move(rows: TouchedRows, state: TouchedState, delta: Tensor) -> None:
            alpha = -_RMS * lr * math.sqrt(width)
            add_scaled_(rows, delta, alpha=alpha, weight_decay=config.weight_decay, lr=lr, step=step)

        table.update(local, direction, move)


def sinkhorn_scales(matrix: Tensor, *, iterations: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Scales that give ``rows[:, None] * matrix * columns`` rows and columns of equal norm. Collective over ``group``.

    Args:
        matrix: ``[n, width]`` fp32, this rank's rows of a matrix that is spread over the group; none may be there.
        iterations: Alternations of row and column normalisation, beginning with rows; odd.
        group: gloo group of the ranks that have the rows; None where this one has all.

    Returns:
        ``rows [n]`` and ``columns [width]`` float64 on the matrix's device; 0 for rows of negligible norm.
    """

    def total(values: np.ndarray, op: str) -> np.ndarray:
        if group is not None:
            dist.all_reduce(torch.from_numpy(values), dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group)
        return values

    columns = torch.ones(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    norms = row_norms(matrix, columns)
    count = int(total(np.array([len(matrix)]), "sum")[0])
    mean = order_free_sum(norms.cpu().numpy(), total) / max(1, count)
    rows = torch.where(norms > _NEGLIGIBLE * mean, 1.0, 0.0).to(torch.float64)
    bits = 62 - count.bit_length()
    for iteration in range(iterations):
        if iteration % 2 == 0:
            rows /= rows * row_norms(matrix, columns) + _EPSILON
            continue
        peak = torch.from_numpy(total(column_maxima(matrix, rows, columns).cpu().numpy(), "max")).to(columns.device)
        peak = torch.where(peak > 0, peak, 1.0)
        squares = column_squares(matrix, rows, columns / peak, bits=bits)
        squares = torch.from_numpy(total(squares.cpu().numpy(), "sum")).to(columns.device)
        norms = peak * (squares.double() * 2.0**-bits).sqrt()
        # A column of zeros stays one whatever its scale, which must not grow without end.
        columns = torch.where(norms > 0, columns / (norms + _EPSILON), columns)
    return rows, columns


ROW_OPTIMIZERS: dict[str, Callable[[RowOptimizerConfig], RowOptimizer]] = {
    "sgd": Sgd,
    "rowwise_adagrad": RowwiseAdagrad,
    "lazy_adam": LazyAdam,
    "partial_rowwise_adam": PartialRowwiseAdam,
    "sinkhorn_momentum": SinkhornMomentum,
}


def build_row_optimizer(config: RowOptimizerConfig) -> RowOptimizer:
    """The optimizer that ``config.name`` names."""
    return ROW_OPTIMIZERS[config.name](config)
