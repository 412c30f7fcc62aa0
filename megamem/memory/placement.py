"""Placement: where a logical row of a table is stored. Owners hold contiguous ranges of *positions*.

``contiguous``: position equals row. ``scrambled``: a bijection spreads neighbouring rows over all owners, so that a head or
a part of the vocabulary that is read more than others does not load one owner more than others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

PlacementName = Literal["contiguous", "scrambled"]

_GOLDEN = (math.sqrt(5) - 1) / 2
MAX_ROWS = 2**41
"""Rows that a table may have: products of two row ids in halves stay inside int64."""


@dataclass(frozen=True)
class Placement:
    """The bijection between rows and positions of one table, a pure function of its fields."""

    name: PlacementName
    rows: int
    multiplier: int = 0
    """``position = row * multiplier % rows``; 1 where nothing is scrambled. Recorded in checkpoints; 0 chooses it."""

    def __post_init__(self) -> None:
        if self.rows > MAX_ROWS:
            raise ValueError(f"a table of {self.rows} rows: more than {MAX_ROWS} have no placement")
        if not self.multiplier:
            object.__setattr__(self, "multiplier", _multiplier(self.rows) if self.name == "scrambled" else 1)
        if math.gcd(self.multiplier, self.rows) != 1:
            raise ValueError(f"multiplying by {self.multiplier} is no bijection of {self.rows} rows")

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Positions of logical rows; int64 of any shape, values in ``[0, rows)`` (not checked)."""
        return rows if self.multiplier == 1 else _multiply(rows, self.multiplier, self.rows)

    def logical(self, positions: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`positions`."""
        return positions if self.multiplier == 1 else _multiply(positions, self._inverse, self.rows)

    @cached_property
    def _inverse(self) -> int:
        return pow(self.multiplier, -1, self.rows)


def _multiplier(rows: int) -> int:
    """The first number from the golden section of ``rows`` on that shares no factor with it.

    Steps of the golden section fill an interval evenly (three-distance theorem), so any run of neighbouring rows is spread
    over all positions.
    """
    if rows < 3:
        return 1
    candidate = int(rows * _GOLDEN)
    while math.gcd(candidate, rows) != 1:
        candidate += 1
    return candidate


def _multiply(values: np.ndarray, factor: int, modulus: int) -> np.ndarray:
    """``values * factor % modulus`` without leaving int64, both below ``modulus <= 2**41``."""
    if modulus <= 2**31:
        return values * factor % modulus
    high, low = divmod(factor, 1 << 21)
    return ((values * high % modulus << 21) % modulus + values * low % modulus) % modulus
