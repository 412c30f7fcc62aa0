"""What one step of the memory engine cost, as numbers for a journal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class StepStats:
    """Counts and times of one rank in one step."""

    lookups: int = 0
    """Addresses before de-duplication, all streams and micro-batches."""
    unique_rows: int = 0
    """Addresses after de-duplication, all streams."""
    rows_received: int = 0
    """Rows of all tables in the working sets, those from this rank's own part included."""
    bytes_sent: int = 0
    """Payload sent to other ranks: counts, ids, rows, gradients."""
    bytes_received: int = 0
    plan_seconds: float = 0.0
    stall_seconds: float = 0.0
    """Time the training loop waited in submit, take and return_gradients."""
    update_seconds: float = 0.0
    """Time of the row optimizer."""
    touched_rows: dict[str, int] = field(default_factory=dict)
    """Per table, the owned rows that got a gradient from any rank."""

    @contextmanager
    def timed(self, *fields: str) -> Iterator[None]:
        """Add the wall time of the block to ``fields``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            for name in fields:
                setattr(self, name, getattr(self, name) + elapsed)

    def as_dict(self) -> dict[str, float]:
        """Flat numbers: ``unique_ratio`` is ``unique_rows / lookups``, ``touched_rows/<table>`` a count per table."""
        return {
            "lookups": self.lookups,
            "unique_rows": self.unique_rows,
            "unique_ratio": self.unique_rows / max(1, self.lookups),
            "rows_received": self.rows_received,
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "plan_seconds": self.plan_seconds,
            "stall_seconds": self.stall_seconds,
            "update_seconds": self.update_seconds,
            **{f"touched_rows/{name}": count for name, count in self.touched_rows.items()},
        }
