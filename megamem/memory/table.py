"""Tables: their description, and the part of them that one rank owns, wherever its tier keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from megamem.memory.config import StorageConfig
from megamem.memory.fences import Fence
from megamem.memory.placement import Placement
from megamem.memory.snapshot import Snapshot
from megamem.memory.spec import TOUCHED, TableSpec
from megamem.memory.tiers.base import RowStore, record_bytes
from megamem.memory.tiers.disk import remove_other_layouts
from megamem.memory.tiers.resources import TierResources
from megamem.parallel.layout import owner_range
from megamem_kernels.formats import ROWS, Field, row_fields
from megamem_kernels.initialize import normal_rows
from megamem_kernels.random import key_of
from megamem_kernels.rounding import quantize_rows
from megamem_kernels.row_gather import copy_rows, scatter_rows
from megamem_kernels.row_update import TouchedRows, TouchedState

STATE = "state."
"""Before the name of a state field, its key in :meth:`OwnedTable.read` and in checkpoints."""

UpdateRule = Callable[[TouchedRows, TouchedState, Tensor], None]
"""Updates rows and state in place, given their gradient ``[u, width]`` fp32."""

_CHUNK_BYTES = 4 * 2**20


@dataclass(slots=True)
class OwnedTable:
    """Positions ``[start, stop)`` of a table with their optimizer state. *Local* numbers count positions from ``start``.

    One thread at a time trains it; others may read a :class:`~megamem.memory.snapshot.Snapshot` of it meanwhile.
    """

    spec: TableSpec
    placement: Placement
    start: int
    stop: int
    storage: StorageConfig
    rows: RowStore
    """Fields of :func:`~megamem_kernels.formats.row_fields`."""
    state: RowStore
    """fp32 and int32 fields of the row optimizer, and :data:`TOUCHED`."""
    key: int
    """Of stochastic rounding."""
    _touched: int | None = 0
    """Rows that were ever updated; None: to be counted."""
    lock: Lock = field(default_factory=Lock, repr=False)
    """Held while stores are used."""
    snapshot_taken: Snapshot | None = field(default=None, repr=False)
    """The one that is being read."""
    _changed: np.ndarray | None = field(default=None, repr=False)
    """bool ``[owned rows]``: changed since :meth:`track_changes` or the last snapshot; None: nobody asked."""
    _updated: Fence = field(init=False, repr=False)
    """Behind the last update, whose kernels may run on another stream than a copy of a snapshot."""

    def __post_init__(self) -> None:
        arrays = [*self.rows.arrays.values(), *self.state.arrays.values()]
        self._updated = Fence(next((array.device for array in arrays if array.is_cuda), torch.device("cpu")))

    @classmethod
    def create(
        cls,
        spec: TableSpec,
        *,
        owners: int = 1,
        owner: int = 0,
        seed: int,
        placement: Placement | None = None,
        storage: StorageConfig | None = None,
        state_fields: tuple[Field, ...] = (),
        resources: TierResources | None = None,
    ) -> OwnedTable:
        """What ``owner`` of ``owners`` stores, with initial rows and zero state.

        Initial rows are normal (:class:`InitSegment`), rounded to the nearest value of the format: a function of seed, name
        and logical row, whatever the owners, placement and tier. Disk files of the checkpoint ``resources.resume`` are
        taken over in place of that, if both rows and state have them: see :attr:`committed`.

        Raises:
            TierError: there is no room where the rows or their state should be.
        """
        placement = placement or Placement("contiguous", spec.rows)
        storage, resources = storage or StorageConfig(), resources or TierResources()
        owned = owner_range(spec.rows, owners, owner)
        part = f"{spec.name}.{owner}-of-{owners}"
        fields = row_fields(storage.format, spec.width)
        if resources.disk_root is not None and resources.disk_root.is_dir():
            tiers = {"rows": storage.tier, "state": storage.tier_of_state}
            on_disk = {part for part, tier in tiers.items() if tier == "disk"}
            remove_other_layouts(resources.disk_root, spec.name, owners, on_disk)
        rows = resources.open(storage.tier, f"{part}.rows", fields, len(owned), pin=True)
        try:
            state = resources.open(storage.tier_of_state, f"{part}.state", (*state_fields, TOUCHED), len(owned))
        except BaseException:
            rows.close()
            raise
        key = key_of("rounding", seed, spec.name)
        table = cls(spec, placement, owned.start, owned.stop, storage, rows, state, key)
        try:
            if table.committed:
                table._touched = None
            else:
                table._initialize(seed)
        except BaseException:
            table.close()
            raise
        return table

    def gather(self, local: np.ndarray, out: Mapping[str, Tensor]) -> None:
        """Copy rows as they are stored.

        Args:
            local: ``[n]`` int64 local numbers, in any order.
            out: Per row field ``[n, *shape]``, on the CPU or where the rows are.
        """
        with self.lock:
            for low, high in _pieces(len(local), self.rows.capacity):
                slots = torch.from_numpy(self.rows.locate(local[low:high], write=False))
                for name, array in self.rows.arrays.items():
                    target, index = out[name][low:high], slots.to(array.device)
                    if target.device == array.device:
                        copy_rows(array, index, target)
                    else:
                        target.copy_(copy_rows(array, index, torch.empty_like(target, device=array.device)))

    def update(self, local: np.ndarray, gradient: Tensor, rule: UpdateRule) -> None:
        """Apply ``rule`` to rows and their state, in pieces that the tiers can hold at once, and mark the rows touched.

        Args:
            local: ``[u]`` int64, distinct local numbers.
            gradient: ``[u, width]`` fp32, handed to the rule piece by piece where the rows are.
            rule: See :data:`UpdateRule`; its result for a row may not depend on the other rows.
        """
        for low, high in _pieces(len(local), min(self.rows.capacity, self.state.capacity)):
            with self.lock:
                self._update(local[low:high], gradient[low:high], rule)

    def _update(self, local: np.ndarray, gradient: Tensor, rule: UpdateRule) -> None:
        row_slots = torch.from_numpy(self.rows.locate(local, write=True))
        state_slots = torch.from_numpy(self.state.locate(local, write=True))
        if self.snapshot_taken is not None:
            self.snapshot_taken.keep(local)
        if self._changed is not None:
            self._changed[local] = True
        ids = torch.from_numpy(self.placement.logical(local + self.start))
        device = self.rows.arrays[ROWS].device
        rows = TouchedRows(self.rows.arrays, row_slots.to(device), ids.to(device), self.key)
        with _state_beside(self.state, state_slots, device) as state:
            rule(rows, state, gradient.to(device))
            touched = state.arrays[TOUCHED.name]
            if self._touched is not None:
                self._touched += len(local) - int(touched[state.slots].count_nonzero())
            touched[state.slots] = 1
        self._updated.set()

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """A copy on the CPU of positions ``[start, stop)``, by checkpoint key: row fields under their own names (``rows``,
        ``scales``), state as ``state.<name>``. Each ``[stop - start, *shape]`` of the field."""
        with self.lock:
            return self.stored(slice(start - self.start, stop - self.start))

    def stored(self, local: slice | np.ndarray) -> dict[str, Tensor]:
        """As :meth:`read`, of a slice of local numbers or of distinct ones ``[n]`` int64. The caller holds :attr:`lock`."""
        self._updated.synchronize()
        rows, state = (
            store.read(local.start, local.stop) if isinstance(local, slice) else store.pick(local)
            for store in (self.rows, self.state)
        )
        return {**rows, **{STATE + name: tensor for name, tensor in state.items()}}

    def write(self, first: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace positions from ``first`` on: all row fields, all of the state, or both, as :meth:`read` returns them."""
        rows = {name: tensor for name, tensor in tensors.items() if not name.startswith(STATE)}
        state = {name[len(STATE) :]: tensor for name, tensor in tensors.items() if name.startswith(STATE)}
        with self.lock:
            if self.snapshot_taken is not None:
                raise ValueError(f"table {self.spec.name} is written while a snapshot of it is read")
            if rows:
                self.rows.write(first - self.start, rows)
            if state:
                self.state.write(first - self.start, state)
                self._touched = None
            if self._changed is not None:
                count = len(next(iter(tensors.values())))
                self._changed[first - self.start : first - self.start + count] = True

    def snapshot(self, folder: Path, *, changed_only: bool = False, track_changes: bool = False) -> Snapshot:
        """Hold on to the present content, of all owned rows or of those that changed since the last snapshot.

        Args:
            folder: Where old records go that must be kept while the snapshot is read.
            changed_only: Leave out rows that did not change since :meth:`track_changes` or the last snapshot.
            track_changes: From now on, remember which rows change, for the next snapshot.

        Raises:
            ValueError: an earlier snapshot is open, or changes were not tracked.
            OSError: there can be no file in ``folder``.
        """
        with self.lock:
            if self.snapshot_taken is not None:
                raise ValueError(f"table {self.spec.name} has a snapshot that is being read")
            if changed_only and self._changed is None:
                raise ValueError(f"nobody tracked which rows of table {self.spec.name} changed")
            self.snapshot_taken = Snapshot(self, folder, self._changed if changed_only else None)
            self.track_changes(track_changes)
        return self.snapshot_taken

    def track_changes(self, on: bool = True) -> None:
        """From now on, remember which rows change: one byte per row. Or do not."""
        self._changed = np.zeros(self.stop - self.start, dtype=np.bool_) if on else None

    @property
    def changed_rows(self) -> int | None:
        """How many rows changed since the last snapshot; None where that was not tracked."""
        return None if self._changed is None else int(np.count_nonzero(self._changed))

    @property
    def record_bytes(self) -> int:
        """Bytes of one row with its state."""
        return record_bytes(self.rows.fields) + record_bytes(self.state.fields)

    @property
    def usage(self) -> float:
        """Fraction of the owned rows that were ever updated; 0 where none are owned. Reads the state once after a load."""
        if self._touched is None:
            with self.lock:
                self._touched = sum(
                    int(self.state.read(low, high)[TOUCHED.name].count_nonzero())
                    for low, high in _pieces(self.stop - self.start, _chunk(record_bytes(self.state.fields)))
                )
        return self._touched / max(1, self.stop - self.start)

    def resident_bytes(self) -> dict[str, int]:
        """Bytes of rows and state by kind of memory: ``device``, ``host``, ``disk``."""
        total: dict[str, int] = {}
        for store in (self.rows, self.state):
            for kind, size in store.resident_bytes().items():
                total[kind] = total.get(kind, 0) + size
        return total

    def commit(self, label: str) -> None:
        """Let a later process find what disk files hold now under ``label``, the checkpoint that has just been written; with an
        empty one, let it find nothing.

        Raises:
            TierError: the files cannot be written.
        """
        self.rows.commit(label)
        self.state.commit(label)

    @property
    def committed(self) -> str:
        """The label under which rows and state were committed as they are now; empty where any of them was not."""
        label = self.rows.committed
        return label if label == self.state.committed else ""

    def close(self) -> None:
        """Release memory and files. Idempotent."""
        self.rows.close()
        self.state.close()

    def _initialize(self, seed: int) -> None:
        key = key_of("rows", seed, self.spec.name)
        width = self.spec.width
        for low, high in _pieces(self.stop - self.start, _chunk(4 * width)):
            ids = self.placement.logical(np.arange(self.start + low, self.start + high))
            values = torch.zeros(high - low, width)
            column = 0
            for segment in self.spec.init:
                if segment.std:
                    part = torch.empty(high - low, segment.width)
                    normal_rows(part, ids, key=key, first_element=column, std=segment.std, truncated=segment.truncated)
                    values[:, column : column + segment.width] = part
                column += segment.width
            fields = {field.name: field.allocate(high - low) for field in self.rows.fields}
            quantize_rows(values, fields)
            self.rows.write(low, fields)
        if self.state.committed:  # kept from an earlier process, but the rows were not
            for low, high in _pieces(self.stop - self.start, _chunk(record_bytes(self.state.fields))):
                self.state.write(low, {field.name: field.allocate(high - low) for field in self.state.fields})


@contextmanager
def _state_beside(store: RowStore, slots: Tensor, device: torch.device) -> Iterator[TouchedState]:
    """State where the rows are: as it is stored, or a copy that is written back."""
    if all(array.device == device for array in store.arrays.values()):
        yield TouchedState(store.arrays, slots.to(device))
        return
    copies = {}
    for name, array in store.arrays.items():
        index = slots.to(array.device)
        part = torch.empty(len(slots), *array.shape[1:], dtype=array.dtype, device=array.device)
        copies[name] = copy_rows(array, index, part).to(device)
    yield TouchedState(copies, torch.arange(len(slots), device=device))
    for name, array in store.arrays.items():
        scatter_rows(array, slots.to(array.device), copies[name].to(array.device))


def _pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``size`` items that cover ``[0, count)``."""
    for low in range(0, count, size):
        yield low, min(low + size, count)


def _chunk(item_bytes: int) -> int:
    return max(1, _CHUNK_BYTES // item_bytes)
