"""Row optimizers by name: the state each keeps per row, and its update of touched rows.

A new one is a class with a ``state`` and an ``update``, entered in :data:`ROW_OPTIMIZERS` and in the literal of
``memory.optimizer.name``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megamem.memory.config import RowOptimizerConfig
from megamem.memory.table import OwnedTable
from megamem_kernels.row_update import lazy_adam_, rowwise_adagrad_


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One state tensor of a row optimizer, initially zero: ``[rows]``, or ``[rows, width]`` with ``per_element``."""

    name: str
    dtype: torch.dtype
    per_element: bool

    def allocate(self, table: OwnedTable) -> Tensor:
        """Zeros for every owned row of ``table``."""
        return torch.zeros(table.rows.shape if self.per_element else table.rows.shape[:1], dtype=self.dtype)


class RowOptimizer(Protocol):
    """Updates touched rows; rows that no step touches and their state never change."""

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The state tensors it keeps for every table."""
        ...

    def update(self, table: OwnedTable, index: Tensor, gradient: Tensor, *, lr: float, step: int) -> None:
        """Change ``table`` in place.

        Args:
            table: Owned rows whose ``state`` holds the tensors that :attr:`state` names.
            index: ``[u]`` int64, distinct rows counted from ``table.start``.
            gradient: ``[u, width]`` fp32, summed over every use of a row in the step.
            lr: Learning rate of rows in this step.
            step: Number of this optimizer step, counted from 1.
        """
        ...


class RowwiseAdagrad:
    """:func:`megamem_kernels.row_update.rowwise_adagrad_`: 4 bytes of state per row."""

    state = (StateSpec("accumulator", torch.float32, per_element=False),)

    def __init__(self, config: RowOptimizerConfig) -> None:
        self._config = config

    def update(self, table: OwnedTable, index: Tensor, gradient: Tensor, *, lr: float, step: int) -> None:
        """See :meth:`RowOptimizer.update`; the rule does not depend on ``step``."""
        rowwise_adagrad_(
            table.rows,
            table.state["accumulator"],
            index,
            gradient,
            lr=lr,
            epsilon=self._config.epsilon,
            weight_decay=self._config.weight_decay,
        )


class LazyAdam:
    """:func:`megamem_kernels.row_update.lazy_adam_`: 8 bytes of state per element and 4 per row."""

    state = (
        StateSpec("exp_avg", torch.float32, per_element=True),
        StateSpec("exp_avg_sq", torch.float32, per_element=True),
        StateSpec("last_step", torch.int32, per_element=False),
    )

    def __init__(self, config: RowOptimizerConfig) -> None:
        self._config = config

    def update(self, table: OwnedTable, index: Tensor, gradient: Tensor, *, lr: float, step: int) -> None:
        """See :meth:`RowOptimizer.update`."""
        beta1, beta2 = self._config.betas
        lazy_adam_(
            table.rows,
            table.state["exp_avg"],
            table.state["exp_avg_sq"],
            table.state["last_step"],
            index,
            gradient,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            epsilon=self._config.epsilon,
            weight_decay=self._config.weight_decay,
            step=step,
        )


ROW_OPTIMIZERS: dict[str, Callable[[RowOptimizerConfig], RowOptimizer]] = {
    "rowwise_adagrad": RowwiseAdagrad,
    "lazy_adam": LazyAdam,
}


def build_row_optimizer(config: RowOptimizerConfig) -> RowOptimizer:
    """The optimizer that ``config.name`` names."""
    return ROW_OPTIMIZERS[config.name](config)
