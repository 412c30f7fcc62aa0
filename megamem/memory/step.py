"""What the training loop holds of one step: rows by micro-batch, and the gradients that owners got."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megamem.memory.lookup import MicroMemory
from megamem.memory.norm import AllReduce, order_free_sum
from megamem.memory.slots import Ticket
from megamem.memory.stats import StepStats
from megamem_kernels.row_squares import row_squares


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The rows of one step on one rank, in use."""

    ticket: Ticket

    def micro(self, i: int) -> MicroMemory:
        """The memory of micro-batch ``i``."""
        return self.ticket.micros[i]

    @property
    def working_sets(self) -> dict[str, Tensor]:
        """Per table ``[unique, width]`` fp32 in the order of the plan's positions."""
        return self.ticket.working_sets


@dataclass(frozen=True, slots=True)
class RowGradients:
    """Gradients of the rows that this rank owns: summed over ranks, averaged over data parallelism."""

    rows: dict[str, np.ndarray]
    """Per table ``[u]`` int64, distinct owned rows counted from the owner's first position, ascending."""
    values: dict[str, Tensor]
    """Per table ``[u, width]`` fp32."""
    stats: StepStats

    def norm_sq(self, all_reduce: AllReduce) -> float:
        """Squared norm over every row of every rank that takes part in ``all_reduce``, each touched row counted once. Bit for
        bit the same for any placement and any number of owners, given the same gradients."""
        squares = [row_squares(gradient) for gradient in self.values.values()]
        return order_free_sum(np.concatenate(squares) if squares else np.empty(0), all_reduce)

    def scale(self, factor: float) -> None:
        """Multiply all gradients in place."""
        for gradient in self.values.values():
            gradient.mul_(factor)
