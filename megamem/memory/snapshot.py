"""The content of an owned table at one moment, read piece by piece while training goes on. There is no second copy of the table:
before a row that was not read yet is updated, its old record goes to a temporary file."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_READ = -1
_PIECE_BYTES = 4 * 2**20


class SnapshotSource(Protocol):
    """What a snapshot asks of its table, a :class:`~megamem.memory.table.OwnedTable`."""

    start: int
    stop: int
    lock: Lock
    snapshot_taken: Snapshot | None

    @property
    def record_bytes(self) -> int: ...

    def stored(self, local: slice | np.ndarray) -> dict[str, Tensor]: ...

    def commit(self, label: str) -> None: ...


class Snapshot:
    """What an owned table held when :meth:`~megamem.memory.table.OwnedTable.snapshot` was called.

    Threads may :meth:`read` at once, while another one updates the table; it is locked for as long as one piece is copied.
    Costs of a row: the one to four bytes that say where its old record is, and, once per snapshot and only for a row that is
    updated before it was read, that record on the disk.
    """

    def __init__(self, table: SnapshotSource, folder: Path, only: np.ndarray | None) -> None:
        """See :meth:`~megamem.memory.table.OwnedTable.snapshot`; ``only`` bool ``[owned rows]``: which ones, None for all."""
        self._table = table
        self._only = only
        count = table.stop - table.start
        self._where = np.zeros(count, dtype=np.min_scalar_type(-count - 1))
        """Per row: 0 as it was, n the n-th record of the file, or that it was read."""
        self._log = _Log(folder, table.record_bytes)
        self._failure: OSError | None = None
        self._untouched = True

    @property
    def positions(self) -> np.ndarray:
        """Ascending int64 positions of the rows of a snapshot of changed rows."""
        assert self._only is not None
        return np.flatnonzero(self._only) + self._table.start

    def read(self, positions: range | np.ndarray) -> dict[str, Tensor]:
        """Records by checkpoint key, as :meth:`~megamem.memory.table.OwnedTable.read` returns them.

        Args:
            positions: Owned ones, a range of step 1 or distinct int64 ``[n]``, none of them read before.

        Raises:
            OSError: an old record could not be kept (disk full): this snapshot is lost. The table is not.
        """
        table = self._table
        local: slice | np.ndarray
        if isinstance(positions, range):
            local = slice(positions.start - table.start, positions.stop - table.start)
        else:
            local = positions - table.start
        with table.lock:
            if self._failure is not None:
                raise self._failure
            content = table.stored(local)
            where = self._where[local].copy()
            self._where[local] = _READ
        if where.min(initial=0) < 0:
            raise ValueError("a position of a snapshot is read once")
        kept = np.flatnonzero(where)
        if len(kept):
            old = self._log.read(where[kept].astype(np.int64) - 1)
            at = 0
            for view in _views(content):
                view[kept] = old[:, at : at + view.shape[1]]
                at += view.shape[1]
        return content

    def keep(self, local: np.ndarray) -> None:
        """Write down the rows ``local`` int64 that are about to change. The table calls it, and holds its lock."""
        self._untouched = False
        if self._failure is not None:
            return
        wanted = self._where[local] == 0
        if self._only is not None:
            wanted &= self._only[local]
        rows = local[wanted]
        step = max(1, _PIECE_BYTES // self._table.record_bytes)
        for low in range(0, len(rows), step):
            part = rows[low : low + step]
            content = np.concatenate(_views(self._table.stored(part)), axis=1)
            try:
                first = self._log.append(content)
            except OSError as error:  # the checkpoint fails and not the training
                self._failure = error
                return
            self._where[part] = np.arange(first + 1, first + 1 + len(part))

    def close(self, label: str = "") -> None:
        """Let the table go on without it; idempotent.

        Args:
            label: Of the checkpoint that holds what was read. Disk files are committed under it, unless rows were updated
                meanwhile: then they are no more what the checkpoint is, and an earlier commit is given up, since a resume takes
                the newer checkpoint.

        Raises:
            TierError: disk files cannot be committed.
        """
        table = self._table
        with table.lock:
            if table.snapshot_taken is not self:
                return
            table.snapshot_taken = None
            self._log.close()
            if label:
                table.commit(label if self._untouched else "")


class _Log:
    """Records of one size, numbered from 0, in a file that has no name and ends with the process."""

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by close()
        self._record_bytes = record_bytes
        self._records = 0
        self._mapped = np.empty((0, record_bytes), dtype=np.uint8)
        """Of the records that there were when one beyond it was last read."""

    def append(self, content: np.ndarray) -> int:
        """Write uint8 ``[n, record_bytes]``; returns the number of the first."""
        first, rest = self._records, content.reshape(-1).data
        at = first * self._record_bytes
        while rest:
            done = os.pwrite(self._file.fileno(), rest, at)
            rest, at = rest[done:], at + done
        self._records += len(content)
        return first

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Records ``numbers`` int64 ``[n]``: uint8 ``[n, record_bytes]``. Other threads run meanwhile."""
        mapped = self._mapped
        if numbers.max() >= len(mapped):
            area = mmap.mmap(self._file.fileno(), self._records * self._record_bytes, prot=mmap.PROT_READ)
            area.madvise(mmap.MADV_RANDOM)  # pages that had to leave memory come back one by one
            mapped = self._mapped = np.frombuffer(area, dtype=np.uint8).reshape(-1, self._record_bytes)
        out = np.empty((len(numbers), self._record_bytes), dtype=np.uint8)
        # A mode other than "raise" lets take() write straight into out.
        return np.take(mapped, numbers, axis=0, out=out, mode="clip")

    def close(self) -> None:
        self._mapped = self._mapped[:0].copy()
        self._file.close()


def _views(content: Mapping[str, Tensor]) -> list[np.ndarray]:
    """Per field, in a fixed order, uint8 ``[n, bytes]`` over the same memory."""
    return [bytes_of(content[key]) for key in sorted(content)]


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A contiguous CPU tensor ``[n, *shape]`` as uint8 ``[n, bytes]`` over the same memory."""
    size = tensor[:1].numel() * tensor.element_size() if len(tensor) else 0
    return tensor.reshape(-1).view(torch.uint8).numpy().reshape(len(tensor), size)
