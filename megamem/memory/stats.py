"""What one step of the memory engine cost, as numbers for a journal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal


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
    patched_rows: int = 0
    """Rows of the working sets that were fetched ahead, updated by their owner since, and brought up to date before use."""
    stale_rows: int = 0
    """Rows of this owner that ranks used without an update that was made before (``memory.staleness``)."""
    plan_seconds: float = 0.0
    """Addressing and de-duplication."""
    fetch_seconds: float = 0.0
    """Exchanges that fill and patch the working sets, behind the training loop's back where rows are prefetched."""
    stall_seconds: float = 0.0
    """Time the training loop waited for rows and for the return of gradients: what is left of the above when it is not hidden."""
    update_seconds: float = 0.0
    """Time of the row optimizer."""
    touched_rows: dict[str, int] = field(default_factory=dict)
    """Per table, the owned rows that got a gradient from any rank."""
    rows_per_tier: Counter[str] = field(default_factory=Counter)
    """Owned rows that were read or written, by ``<read|written>/<tier>``; see :meth:`count_io`."""
    bytes_per_tier: Counter[str] = field(default_factory=Counter)
    """Bytes of those rows and of their optimizer state."""
    resident_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes that the owned rows and their state hold, by kind of memory: ``device``, ``host``, ``disk``."""

    def count_io(self, tier: str, direction: Literal["read", "written"], *, rows: int, nbytes: int) -> None:
        """Add owned rows that this step read from a tier or wrote to it."""
        self.rows_per_tier[f"{direction}/{tier}"] += rows
        self.bytes_per_tier[f"{direction}/{tier}"] += nbytes

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
        """Flat numbers: the counts and times above, and

        - ``unique_ratio``, ``unique_rows / lookups``; ``patch_ratio``, ``patched_rows / rows_received``;
        - ``touched_rows/<table>``;
        - ``rows_read/<tier>``, ``rows_written/<tier>``, ``bytes_read/<tier>``, ``bytes_written/<tier>``, of this step;
        - ``resident_bytes/<tier>``.
        """
        return {
            "lookups": self.lookups,
            "unique_rows": self.unique_rows,
            "unique_ratio": self.unique_rows / max(1, self.lookups),
            "rows_received": self.rows_received,
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "patched_rows": self.patched_rows,
            "patch_ratio": self.patched_rows / max(1, self.rows_received),
            "stale_rows": self.stale_rows,
            "plan_seconds": self.plan_seconds,
            "fetch_seconds": self.fetch_seconds,
            "stall_seconds": self.stall_seconds,
            "update_seconds": self.update_seconds,
            **{f"touched_rows/{name}": count for name, count in self.touched_rows.items()},
            **{f"rows_{key}": count for key, count in self.rows_per_tier.items()},
            **{f"bytes_{key}": count for key, count in self.bytes_per_tier.items()},
            **{f"resident_bytes/{tier}": count for tier, count in self.resident_bytes.items()},
        }
