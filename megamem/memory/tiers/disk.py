"""The ``disk`` tier: records in a file at home locations, and a bounded cache of them in host memory.

**What is promised.** After a kill at any moment, the next process on the same boot of the same machine finds what
:meth:`DiskStore.commit` was last called with, bit for bit: before a record that was not changed since is changed, its old
content goes to ``<file>.undo`` with a checksum, and opening the file puts it back. The pages of a killed process are in
the system's memory, so no flush is needed for that. After a power cut nothing is promised, since the order in which pages
reached the disk is not known: the boot id differs then, the file is made anew, and the rows come from the checkpoint.
Contents that were never committed are gone with their process, as those whose commit was given up (an empty label): from then on
nothing is written down.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megamem.files import write_text
from megamem.memory.tiers.base import record_bytes
from megamem.memory.tiers.journal import UndoJournal
from megamem.memory.tiers.records import RecordFile, failed, truncated
from megamem_kernels.formats import Field
from megamem_kernels.jit import njit

_CHUNK_BYTES = 1 << 22
DISK_INDEX_BYTES = 5
"""Host memory per record beside the cache: where it is cached, and whether the undo journal has it."""
_SLOT_BYTES = 8 + 8 + 1 + 1
"""Of one slot beside its record: which record, when located, whether located since the hand came by, whether changed."""


@dataclass(frozen=True)
class Commit:
    """Content of ``<file>.commit``."""

    label: str
    epoch: int
    """Number of the commit; undo batches of another one do not count."""
    boot: str
    records: int
    fields: list[list[str]]
    """Name, dtype and shape of each field of a record."""


class DiskStore:
    """A :class:`~megamem.memory.tiers.base.RowStore` in ``<path>.rec``; a record is its fields one after the other.

    Records are cached one by one and not by pages: hashed rows that are read together do not lie together. Reads and writes
    of a batch go out in the order of the file, ``queue_depth`` at a time. The cache gives up records that were not located
    for long (CLOCK).
    """

    def __init__(
        self,
        path: Path,
        fields: tuple[Field, ...],
        records: int,
        *,
        cache_bytes: int,
        queue_depth: int,
        resume: str = "",
    ) -> None:
        """``resume``: take over the file that was committed under this label, if there is one; else all records are zero.

        Raises:
            TierError: no room, no permission, the file is in use, or it is the committed one and was truncated.
        """
        self.fields, self.records = fields, records
        size = record_bytes(fields)
        self.capacity = _capacity(size, records, cache_bytes)
        self.arrays = {field.name: field.allocate(self.capacity) for field in fields}
        self._views = _byte_views(fields, self.arrays)
        self._slot_of = np.full(records, -1, dtype=np.int32)
        self._record_of = np.full(self.capacity, -1, dtype=np.int64)
        self._located = np.zeros(self.capacity, dtype=np.int64)
        self._recent = np.zeros(self.capacity, dtype=np.uint8)
        self._dirty = np.zeros(self.capacity, dtype=np.uint8)
        self._saved = np.zeros(records, dtype=np.uint8)
        """Whether the undo journal has the record."""
        self._now = self._hand = self._used = 0
        self._label, self._epoch, self._changed = "", 0, True
        self._commit_path = path.with_name(path.name + ".commit")
        self._file = RecordFile(path.with_name(path.name + ".rec"), size, records, queue_depth=queue_depth)
        self._journal: UndoJournal | None = None
        try:
            self._journal = UndoJournal(path.with_name(path.name + ".undo"), size)
            found = _read_commit(self._commit_path)
            if resume and found == Commit(resume, found.epoch if found else 0, _boot_id(), records, _layout(fields)):
                self._take_over(found)
            else:
                self._uncommit()
                self._file.clear()
        except BaseException as error:
            self._file.close()
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            if isinstance(error, OSError):
                raise failed(path, error) from error
            raise

    def locate(self, records: np.ndarray, *, write: bool) -> np.ndarray:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        self._now += 1
        slots = self._slot_of[records].astype(np.int64)
        present = slots >= 0
        self._located[slots[present]] = self._now
        self._recent[slots[present]] = 1
        if not present.all():
            self._bring(np.unique(records[~present]))
            slots = self._slot_of[records].astype(np.int64)
        if write and len(records):
            if self._label:
                self._append(records, slots, self._views)
            self._dirty[slots] = 1
            self._changed = True
        return slots

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        return self.pick(np.arange(start, stop))

    def pick(self, records: np.ndarray) -> dict[str, Tensor]:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        out = {field.name: field.allocate(len(records)) for field in self.fields}
        cached = self._slot_of[records].astype(np.int64)
        absent = np.flatnonzero(cached < 0)
        views = _byte_views(self.fields, out)
        self._file.transfer(views, absent, records[absent], write=False)
        present = np.flatnonzero(cached >= 0)
        for view, source in zip(views, self._views, strict=True):
            view[present] = source[cached[present]]
        return out

    def write(self, start: int, values: Mapping[str, Tensor]) -> None:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        count = len(next(iter(values.values())))
        piece = max(1, _CHUNK_BYTES // record_bytes(self.fields))
        for low in range(0, count, piece):
            high = min(low + piece, count)
            first = start + low
            records = np.arange(first, start + high)
            content = self.read(first, start + high) if self._label or len(values) < len(self.fields) else {}
            if self._label:
                self._append(records, np.arange(len(records)), _byte_views(self.fields, content))
            self._changed = True
            content |= {name: value[low:high].contiguous() for name, value in values.items()}
            views = _byte_views(self.fields, content)
            cached = self._slot_of[first : start + high].astype(np.int64)
            present = np.flatnonzero(cached >= 0)
            self._file.transfer(views, np.arange(len(records)), records, write=True)
            for view, target in zip(views, self._views, strict=True):
                target[cached[present]] = view[present]
            self._dirty[cached[present]] = 0

    def commit(self, label: str) -> None:
        """See :class:`~megamem.memory.tiers.base.RowStore`; what is promised is said at the top of this module."""
        if self._journal is None:
            raise ValueError("the store is closed")
        if not label:
            self._uncommit()
            return
        self._write_back(np.flatnonzero(self._dirty))
        self._file.synchronize()
        self._epoch += 1
        commit = Commit(label, self._epoch, _boot_id(), self.records, _layout(self.fields))
        try:
            write_text(self._commit_path, json.dumps(asdict(commit), indent=1) + "\n")
        except OSError as error:
            raise failed(self._commit_path, error) from error
        # From here on the new epoch counts, and batches of the old one do not, whether or not they are still there.
        self._journal.clear()
        self._saved[:] = 0
        self._label, self._changed = label, False

    @property
    def committed(self) -> str:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        return "" if self._changed else self._label

    def resident_bytes(self) -> dict[str, int]:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        index = (self._slot_of, self._record_of, self._located, self._recent, self._dirty, self._saved)
        cache = sum(array.nbytes for array in self.arrays.values()) + sum(array.nbytes for array in index)
        return {"host": cache, "disk": self._file.bytes + (self._journal.size if self._journal else 0)}

    def close(self) -> None:
        """Close the files; those that were never committed are deleted. Idempotent."""
        if self._journal is None:
            return
        if not self._label:
            for path in (self._file.path, self._journal.path):
                path.unlink(missing_ok=True)
        self._journal.close()
        self._file.close()
        self._journal = None
        self.arrays, self._views = {}, []

    def _take_over(self, commit: Commit) -> None:
        """Put back what was changed since ``commit``."""
        assert self._journal is not None
        if self._file.size != self._file.bytes:
            raise truncated(self._file.path, self._file.size, self._file.bytes)
        for records, content in self._journal.batches(commit.epoch):
            self._file.transfer([content], np.arange(len(records)), records, write=True)
        self._journal.clear()
        self._label, self._epoch, self._changed = commit.label, commit.epoch, False

    def _uncommit(self) -> None:
        """Promise nothing any more: what changes from now on need not be written down."""
        assert self._journal is not None
        try:
            self._commit_path.unlink(missing_ok=True)  # first: without the journal it would promise what is not there
        except OSError as error:
            raise failed(self._commit_path, error) from error
        self._label = ""
        self._saved[:] = 0
        self._journal.clear()

    def _bring(self, records: np.ndarray) -> None:
        """Read distinct ascending records that are not there into slots of others that were not just located."""
        fresh = np.arange(self._used, min(self._used + len(records), self.capacity))
        self._used += len(fresh)
        self._located[fresh] = self._now
        victims = np.empty(len(records) - len(fresh), dtype=np.int64)
        self._hand = _choose(self._located, self._recent, self._now, self._hand, victims)
        self._write_back(victims[self._dirty[victims] == 1])
        gone = self._record_of[victims]
        self._slot_of[gone[gone >= 0]] = -1
        self._record_of[victims] = -1
        slots = np.concatenate([fresh, victims])
        self._file.transfer(self._views, slots, records, write=False)
        self._record_of[slots] = records
        self._slot_of[records] = slots
        self._located[slots] = self._now

    def _write_back(self, slots: np.ndarray) -> None:
        self._file.transfer(self._views, slots, self._record_of[slots], write=True)
        self._dirty[slots] = 0

    def _append(self, records: np.ndarray, slots: np.ndarray, views: list[np.ndarray]) -> None:
        """Write down what records held at the last commit: one that the journal does not have still holds it."""
        assert self._journal is not None
        new = np.flatnonzero(self._saved[records] == 0)
        piece = max(1, _CHUNK_BYTES // record_bytes(self.fields))
        for low in range(0, len(new), piece):
            part = new[low : low + piece]
            content = np.concatenate([view[slots[part]] for view in views], axis=1)
            self._journal.append(self._epoch, records[part], content)
            self._saved[records[part]] = 1


def planned_bytes(fields: tuple[Field, ...], records: int, *, cache_bytes: int) -> dict[str, int]:
    """What :meth:`DiskStore.resident_bytes` will say of a new store."""
    size = record_bytes(fields)
    slots = _capacity(size, records, cache_bytes)
    return {"host": slots * (size + _SLOT_BYTES) + records * DISK_INDEX_BYTES, "disk": records * size}


def _capacity(record: int, records: int, cache_bytes: int) -> int:
    """Slots of a cache."""
    return min(max(1, cache_bytes // (record + _SLOT_BYTES)), max(1, records))


def remove_other_layouts(root: Path, table: str, owners: int, kept: set[str]) -> None:
    """Delete what earlier starts left of a table and nobody can take over: files of other numbers of owners, and of parts
    (``rows``, ``state``) that are not in ``kept`` because they are on another tier now."""
    for path in root.iterdir():
        found = re.fullmatch(rf"{re.escape(table)}\.\d+-of-(\d+)\.(rows|state)\.rec", path.name)
        if found is None or (int(found[1]) == owners and found[2] in kept):
            continue
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused where another run uses it
            for suffix in (".commit", ".undo", ".rec"):
                path.with_suffix(suffix).unlink(missing_ok=True)


def committed_label(path: Path) -> str:
    """The label under which ``path`` (as given to :class:`DiskStore`) was committed last; empty where it never was."""
    found = _read_commit(path.with_name(path.name + ".commit"))
    return found.label if found else ""


def _read_commit(path: Path) -> Commit | None:
    with suppress(FileNotFoundError, ValueError, TypeError):
        return Commit(**json.loads(path.read_text(encoding="utf-8")))
    return None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _layout(fields: tuple[Field, ...]) -> list[list[str]]:
    return [[field.name, str(field.dtype), str(list(field.shape))] for field in fields]


def _byte_views(fields: tuple[Field, ...], arrays: Mapping[str, Tensor]) -> list[np.ndarray]:
    """Per field uint8 ``[records, bytes]`` over the same memory."""
    return [
        arrays[field.name].view(torch.uint8).numpy().reshape(len(arrays[field.name]), field.nbytes)
        if field.shape
        else arrays[field.name].unsqueeze(1).view(torch.uint8).numpy()
        for field in fields
    ]


@njit(nogil=True, cache=True, error_model="numpy")
def _choose(located: np.ndarray, recent: np.ndarray, now: int, hand: int, victims: np.ndarray) -> int:
    """Fill ``victims`` with slots not located ``now``, those not located since the hand last came by first; returns the hand.

    There are at least ``len(victims)`` such slots.
    """
    found = 0
    while found < len(victims):
        if located[hand] != now:
            if recent[hand]:
                recent[hand] = 0
            else:
                victims[found] = hand
                located[hand] = now
                found += 1
        hand = (hand + 1) % len(located)
    return hand
