"""What a table is, whoever owns it: its shape, its initial rows, and what its storage takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamem.memory.config import StorageConfig
from megamem.memory.tiers.base import record_bytes
from megamem.parallel.layout import owner_range
from megamem_kernels.formats import Field, row_fields

TOUCHED = Field("touched", torch.uint8, ())
"""State that every table has: 1 for rows that were ever updated."""


@dataclass(frozen=True, slots=True)
class InitSegment:
    """Initial distribution of ``width`` consecutive columns: normal with mean 0."""

    width: int
    std: float
    """Standard deviation, of the normal before truncation; 0 for zeros."""
    truncated: bool = False
    """Values beyond two standard deviations are drawn again."""


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A logical parameter ``[rows, width]``; ``init`` covers the width from left to right."""

    name: str
    rows: int
    width: int
    init: tuple[InitSegment, ...]

    def __post_init__(self) -> None:
        if self.rows < 1 or self.width < 1 or sum(segment.width for segment in self.init) != self.width:
            raise ValueError(f"table {self.name}: [{self.rows}, {self.width}] is not what {self.init} covers")


def disk_bytes(
    spec: TableSpec, *, owners: int, owner: int, storage: StorageConfig, state_fields: tuple[Field, ...]
) -> int:
    """Size of the files that :meth:`~megamem.memory.table.OwnedTable.create` makes: what ``TierResources.disk_bytes`` is the sum
    of."""
    records = len(owner_range(spec.rows, owners, owner))
    rows = record_bytes(row_fields(storage.format, spec.width)) if storage.tier == "disk" else 0
    state = record_bytes((*state_fields, TOUCHED)) if storage.tier_of_state == "disk" else 0
    return records * (rows + state)
