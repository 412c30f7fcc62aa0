"""What every tier offers: fixed-size records of named fields, brought to where kernels can index them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from megamem_kernels.formats import Field


class RowStore(Protocol):
    """``records`` records of one rank. Not thread-safe: one thread at a time uses a store.

    Kernels index :attr:`arrays` by the *slots* that :meth:`locate` returns. A store that holds everything in memory answers
    with the records themselves; one with a cache brings them in first. So the same kernels serve every tier.
    """

    fields: tuple[Field, ...]
    records: int
    arrays: dict[str, Tensor]
    """Per field ``[slots, *shape]``. A slot is meaningful between the :meth:`locate` that named it and the next."""
    capacity: int
    """Most records that one :meth:`locate` may name; at least 1."""

    def locate(self, records: np.ndarray, *, write: bool) -> np.ndarray:
        """Slots ``[n]`` int64 of ``records`` ``[n]`` int64, in ``[0, records)``, ``n <= capacity``. Repeats are allowed.

        Args:
            records: Which ones.
            write: The caller changes them before its next call; what it writes into the slots is kept.

        Raises:
            TierError: the records cannot be read, or room for them cannot be made.
        """
        ...

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """A copy of records ``[start, stop)``, per field on the CPU. Leaves a cache as it is."""
        ...

    def pick(self, records: np.ndarray) -> dict[str, Tensor]:
        """A copy of ``records`` ``[n]`` int64, distinct and of any number, as :meth:`read` makes it."""
        ...

    def write(self, start: int, values: Mapping[str, Tensor]) -> None:
        """Replace records from ``start`` on; ``values`` holds every field, or some of them."""
        ...

    def commit(self, label: str) -> None:
        """Make the present content what a later process finds under ``label``; nothing to do where none can. With an empty
        ``label`` none will find anything from now on."""
        ...

    @property
    def committed(self) -> str:
        """The label under which the present content was committed, here or by an earlier process; empty where it was not."""
        ...

    def resident_bytes(self) -> dict[str, int]:
        """Bytes held by kind of memory: ``device``, ``host``, ``disk``."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...


def record_bytes(fields: tuple[Field, ...]) -> int:
    """Bytes of one record."""
    return sum(field.nbytes for field in fields)
