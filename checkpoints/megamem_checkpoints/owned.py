"""What one rank writes of its tables: all rows, or those that changed since its last save beside links to that one's files."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megamem.errors import CheckpointError
from megamem.memory.table import OwnedTable
from megamem_checkpoints import tables
from megamem_checkpoints.files import check_size
from megamem_checkpoints.manifest import FileRecord, IncrementRecord, Manifest, TableRecord
from megamem_checkpoints.stream import write_tensors

FILE_BYTES = 64 * 2**20
"""Upper bound of one file, or one row: what a writing thread holds in memory."""

CHANGED_SHARE = 0.3
"""Share of changed rows from which on ``auto`` saves a table as a whole."""

_CHUNK_BYTES = 4 * 2**20
"""What is copied at a time while the table is locked."""

_log = logging.getLogger(__name__)


def index_bytes(rows: int, incremental: Literal["auto", "on", "off"]) -> int:
    """Most host memory that one rank takes, while it saves, to know which of its ``rows`` changed and where old records are."""
    where = np.min_scalar_type(-rows - 1).itemsize
    if incremental == "off":
        return rows * where
    # Which rows changed since the last save, and since this one; and the positions of the former.
    return int(rows * (where + 2 + 8 * (CHANGED_SHARE if incremental == "auto" else 1.0)))


@dataclass(frozen=True, slots=True)
class Base:
    """A complete checkpoint and what one rank has of its tables in it: what an increment adds to."""

    path: Path
    tables: dict[str, TableRecord]
    """Parts that are of the owned rows alone."""
    files: dict[str, FileRecord]
    chain: int = 0
    """As in :class:`~megamem_checkpoints.manifest.Manifest`."""

    @classmethod
    def of(cls, path: Path, manifest: Manifest, owned: Mapping[str, OwnedTable]) -> Base:
        """``path``, from which ``owned`` were just read; tables of another placement, format or cut are left out."""
        parts: dict[str, TableRecord] = {}
        for name, table in owned.items():
            part = tables.part_of(manifest.tables[name], table.start, table.stop)
            if part is not None and tables.without_files(part) == tables.describe(table):
                parts[name] = part
        files = {name: manifest.files[name] for part in parts.values() for name in part.names()}
        return cls(path, parts, files, manifest.chain)


class TableSave:
    """One owned table on its way into the checkpoint of ``step`` below ``root``: begun here, which is all that training waits
    for; then :meth:`plan`, :meth:`write` and :meth:`close`.
    """

    def __init__(
        self, root: Path, table: OwnedTable, step: int, base: Base | None, incremental: Literal["auto", "on", "off"]
    ) -> None:
        """Raises OSError where there is no room for what training may have to set aside."""
        self.record = tables.describe(table)
        self.files: dict[str, FileRecord] = {}
        self._root, self._table, self._prefix = root, table, f"delta_{step:08d}_"
        earlier = base.tables.get(table.spec.name) if base is not None and incremental != "off" else None
        self._increment = False
        self._to_link: list[tuple[Path, Path]] = []
        if base is not None and earlier is not None and self._worth(earlier, incremental):
            names = earlier.names()
            self._increment = _linkable(base, names, root)
            if self._increment:
                self.record.files, self.record.increments = dict(earlier.files), list(earlier.increments)
                self.files = {name: base.files[name] for name in names}
                self._to_link = [(base.path / name, root / name) for name in names[1:]]
        self.snapshot = table.snapshot(root, changed_only=self._increment, track_changes=incremental != "off")

    def plan(self) -> list[tuple[str, range | np.ndarray]]:
        """Link to the files of the checkpoint before; returns those that have to be written, with their positions. The record
        names them from now on.

        Raises:
            OSError: a file cannot be linked to, though the first one could: it is too late to save the table as a whole.
        """
        table, folder = self._table, f"tables/{self._table.spec.name}"
        (self._root / folder).mkdir(parents=True, exist_ok=True)
        for source, target in self._to_link:
            os.link(source, target)
        work: list[tuple[str, range | np.ndarray]] = []
        if not self._increment:
            step = max(1, FILE_BYTES // table.record_bytes)
            for start in range(table.start, table.stop, step):
                stop = min(start + step, table.stop)
                work.append((f"{folder}/rows_{start:012d}_{stop:012d}.safetensors", range(start, stop)))
                self.record.files[work[-1][0]] = [start, stop]
            return work
        changed, step = self.snapshot.positions, max(1, FILE_BYTES // (table.record_bytes + 8))
        for low in range(0, len(changed), step):
            part = changed[low : low + step]
            start, stop = int(part[0]), int(part[-1]) + 1
            work.append((f"{folder}/{self._prefix}{start:012d}_{stop:012d}.safetensors", part))
            self.record.increments.append(IncrementRecord(file=work[-1][0], start=start, stop=stop, count=len(part)))
        return work

    def write(self, name: str, positions: range | np.ndarray) -> None:
        """Write one of the planned files. Threads may call it at once."""
        step = max(1, _CHUNK_BYTES // self._table.record_bytes)
        content: dict[str, Tensor] = {}
        for low in range(0, len(positions), step):
            for key, part in self.snapshot.read(positions[low : low + step]).items():
                if key not in content:
                    content[key] = torch.empty(len(positions), *part.shape[1:], dtype=part.dtype)
                content[key][low : low + len(part)].copy_(part)
        if not isinstance(positions, range):
            content[tables.POSITIONS] = torch.from_numpy(positions)
        self.files[name] = write_tensors(self._root / name, content)

    def close(self, label: str = "") -> None:
        """See :meth:`megamem.memory.snapshot.Snapshot.close`."""
        self.snapshot.close(label)

    def _worth(self, earlier: TableRecord, incremental: str) -> bool:
        """Whether to write an increment to ``earlier``."""
        table, changed = self._table, self._table.changed_rows
        count = table.stop - table.start
        if changed is None or not count or (incremental == "auto" and changed >= CHANGED_SHARE * count):
            return False
        if any(f"/{self._prefix}" in item.file for item in earlier.increments):
            return False  # a second save of one step: its files would have the names of those that it links to
        records = changed + sum(item.count for item in earlier.increments)
        return records * (table.record_bytes + 8) < count * table.record_bytes


def _linkable(base: Base, names: Sequence[str], root: Path) -> bool:
    """Whether files of ``base`` can get a second name below ``root``: all have the right length, and the first one (of
    several: a table has at least one) got it. False leaves nothing behind."""
    try:
        for name in names:
            check_size(base.path, name, base.files[name])
        for name in names[:1]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(base.path / name, root / name)
    except (OSError, CheckpointError) as error:
        why = error.strerror if isinstance(error, OSError) else "one is missing or of another length"
        _say_once(f"tables are saved as a whole: files of the checkpoint before cannot be linked to ({why})")
        return False
    return True


@functools.cache
def _say_once(text: str) -> None:
    _log.warning(text)
