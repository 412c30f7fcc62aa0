"""What the ranks of a memory group want of each other in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megamem.memory.exchange.ids import mark_common
from megamem_kernels.unique import unique

Order = slice | np.ndarray
"""Places in a list: a range, or int64."""


@dataclass(slots=True)
class StreamRequest:
    """One stream at one hop: what this rank asks its peers for, and what they ask this rank for."""

    orders: Sequence[Order]
    """By peer: the places of what it is asked for in this rank's list."""
    asked: Sequence[np.ndarray]
    """By peer: ``[n]`` int64, what it asks this rank for, ascending in this rank's coordinates."""
    limit: int
    """Rows that this rank answers for."""
    _distinct: tuple[np.ndarray, list[np.ndarray]] | None = None

    def wanted(self, peer: int) -> int:
        """Rows that ``peer`` is asked for."""
        order = self.orders[peer]
        return order.stop - order.start if isinstance(order, slice) else len(order)

    @property
    def distinct(self) -> np.ndarray:
        """``[u]`` int64, what any peer asks for, ascending, each once."""
        return self._merged()[0]

    @property
    def inverse(self) -> list[np.ndarray]:
        """By peer: ``[n]`` int64, ``asked[peer] == distinct[inverse[peer]]``."""
        return self._merged()[1]

    def _merged(self) -> tuple[np.ndarray, list[np.ndarray]]:
        if self._distinct is None:
            askers = [ids for ids in self.asked if len(ids)]
            if len(askers) <= 1:
                distinct = askers[0] if askers else np.empty(0, dtype=np.int64)
                self._distinct = distinct, [np.arange(len(ids)) for ids in self.asked]
            else:
                distinct, inverse = unique(np.concatenate(self.asked), self.limit)
                self._distinct = distinct, np.split(inverse, np.cumsum([len(ids) for ids in self.asked])[:-1])
        return self._distinct


@dataclass(slots=True)
class Requests:
    """The rows that were asked for in one step, hop after hop, and which of those this rank owns have changed since."""

    hops: tuple[Mapping[str, StreamRequest], ...]
    """By stream. The last hop ends at the owners: its coordinates are owned rows."""
    tables: Mapping[str, int]
    """Tables of every stream."""
    marks: dict[str, np.ndarray] = field(default_factory=dict)
    """By stream ``[u]`` uint8: 1 for those of the distinct requested rows that were marked."""

    def mark(self, stream: str, touched: np.ndarray) -> None:
        """Remember that owned rows ``touched`` (``[n]`` int64, ascending) of all tables of ``stream`` have changed."""
        requested = self.hops[-1][stream].distinct
        if stream not in self.marks:
            self.marks[stream] = np.zeros(len(requested), dtype=np.uint8)
        mark_common(self.marks[stream], requested, touched)

    @property
    def dirty(self) -> int:
        """Rows of all tables that other ranks, or this one, got from this rank and that have changed since."""
        return sum(
            int(np.count_nonzero(marks[inverse])) * self.tables[stream]
            for stream, marks in self.marks.items()
            for inverse in self.hops[-1][stream].inverse
        )
