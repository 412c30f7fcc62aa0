"""Agreement of all ranks of a run: either all go on, or all raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megamem.errors import CheckpointError, MegamemError

T = TypeVar("T")


class Ranks:
    """The ranks of ``group``; a process alone without one."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(self._group) if self._group is not None else 0
        self.size = dist.get_world_size(self._group) if self._group is not None else 1

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def gather_to_first(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order, on the first rank; nothing on the others."""
        if self.size == 1:
            return [value]
        values: list[T | None] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values or []  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank and wait for all; CheckpointError on every rank if it failed on any."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        for rank, sentence in enumerate(self.gather(_sentence(failure))):
            if sentence is not None:
                where = f" (rank {rank})" if self.size > 1 else ""
                raise CheckpointError(sentence + where) from failure
        return result  # type: ignore[return-value]


def _sentence(failure: Exception | None) -> str | None:
    if failure is None:
        return None
    return str(failure) if isinstance(failure, MegamemError) else f"{type(failure).__name__}: {failure}"
