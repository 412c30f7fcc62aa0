"""Where rows come from and where they go: the store of an owner, the relay between two hops, working sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megamem.memory.exchange.hop import CPU, Workspace
from megamem.memory.exchange.requests import Order, StreamRequest
from megamem.memory.stats import StepStats
from megamem.memory.table import OwnedTable
from megamem.memory.tiers.base import record_bytes
from megamem_kernels.formats import ROWS, Field
from megamem_kernels.row_gather import copy_rows, dequantize_rows, gather_rows, scatter_rows


@dataclass(frozen=True, slots=True)
class Answer:
    """What one peer gets of one stream."""

    places: np.ndarray | None
    """``[n]`` int64, ascending places in its request; None for all of it."""
    index: np.ndarray
    """``[n]`` int64, the rows of the source that it gets there."""


class Source(Protocol):
    """Rows in storage format."""

    def answers(self, stream: str, request: StreamRequest) -> list[Answer]:
        """What every peer gets."""
        ...

    def store(self, table: str, index: np.ndarray, out: dict[str, Tensor]) -> None:
        """Write rows ``index`` as they are stored into fields ``[n, ...]``."""
        ...

    def decode(self, table: str, index: np.ndarray, out: Tensor) -> None:
        """Write rows ``index`` dequantised into ``out`` ``[n, width]``."""
        ...


class Sink(Protocol):
    """Takes what arrives, peer after peer in rank order."""

    @property
    def device(self) -> torch.device:
        """Where it wants them."""
        ...

    def begin(self, stream: str, rows: int) -> None:
        """``rows`` rows of the stream will arrive."""
        ...

    def locate(self, stream: str, order: Order, rows: int) -> Order:
        """Where the next ``rows`` rows go, which have places ``order`` in this rank's list."""
        ...

    def put(self, table: str, where: Order, fields: dict[str, Tensor]) -> None:
        """Take rows that arrived in storage format."""
        ...

    def pull(self, table: str, where: Order, source: Source, index: np.ndarray) -> None:
        """Take rows ``index`` of this rank's own ``source``."""
        ...


class StoredRows:
    """The rows of this owner."""

    def __init__(
        self,
        tables: Mapping[str, OwnedTable],
        marks: Mapping[str, np.ndarray] | None,
        workspace: Workspace,
        stats: StepStats,
        *,
        uva: bool,
    ) -> None:
        """With ``marks`` (by stream, ``[u]`` uint8 over the distinct requested rows), only marked rows are given out."""
        self._tables, self._marks, self._workspace, self._stats = tables, marks, workspace, stats
        self._uva = uva

    def answers(self, stream: str, request: StreamRequest) -> list[Answer]:
        """See :class:`Source`; rows are owned rows."""
        if self._marks is None:
            return [Answer(None, ids) for ids in request.asked]
        if stream not in self._marks:
            return [Answer(none := np.empty(0, dtype=np.int64), none) for _ in request.asked]
        marks = self._marks[stream]
        chosen = [np.flatnonzero(marks[inverse]) for inverse in request.inverse]
        return [Answer(places, ids[places]) for places, ids in zip(chosen, request.asked, strict=True)]

    def store(self, table: str, index: np.ndarray, out: dict[str, Tensor]) -> None:
        """See :class:`Source`."""
        self._tables[table].gather(index, out)
        self._count(table, len(index))

    def decode(self, table: str, index: np.ndarray, out: Tensor) -> None:
        """See :class:`Source`; straight from the store where a kernel can read it on the device of ``out``."""
        store = self._tables[table].rows
        # The cache of a disk table is not pinned, and the next `locate` would overwrite what the kernel reads.
        through_bus = self._uva and out.is_cuda and self._tables[table].storage.tier == "host"
        if store.arrays[ROWS].device != out.device and not through_bus:
            raw = allocate(self._workspace, "own", store.fields, len(index), CPU)
            self.store(table, index, raw)
            dequantize_rows({k: self._workspace.moved(f"own/{k}", rows, out.device) for k, rows in raw.items()}, out)
            return
        with self._tables[table].lock:
            for start in range(0, len(index), store.capacity):
                slots = torch.from_numpy(store.locate(index[start : start + store.capacity], write=False))
                gather_rows(store.arrays, slots.to(out.device), out[start : start + len(slots)])
        self._count(table, len(index))

    def _count(self, table: str, rows: int) -> None:
        owned = self._tables[table]
        self._stats.count_io(owned.storage.tier, "read", rows=rows, nbytes=rows * record_bytes(owned.rows.fields))


class RelayedRows:
    """Rows that a hop brought, in storage format, for the ranks that the hop before it serves. Dense, in the order of this
    rank's list."""

    def __init__(
        self,
        fields: Mapping[str, Mapping[str, tuple[Field, ...]]],
        patched: Mapping[str, int] | None,
        workspace: Workspace,
        device: torch.device,
    ) -> None:
        """``fields``: by stream and table, how rows are stored. ``patched``: where only some rows of this rank's lists
        arrive, the lengths of these lists by stream."""
        self._fields, self._patched, self._workspace, self.device = fields, patched, workspace, device
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._filled: dict[str, int] = {}
        self._present: dict[str, np.ndarray] = {}

    def begin(self, stream: str, rows: int) -> None:
        """See :class:`Sink`."""
        self._filled[stream] = 0
        if self._patched is not None:
            self._present[stream] = np.zeros(self._patched[stream], dtype=np.uint8)
        for table, fields in self._fields[stream].items():
            self._rows[table] = allocate(self._workspace, f"relay/{table}", fields, rows, self.device)

    def locate(self, stream: str, order: Order, rows: int) -> Order:
        """See :class:`Sink`."""
        if stream in self._present:
            self._present[stream][order] = 1
        start = self._filled[stream]
        self._filled[stream] = start + rows
        return slice(start, start + rows)

    def put(self, table: str, where: Order, fields: dict[str, Tensor]) -> None:
        """See :class:`Sink`."""
        for name, rows in fields.items():
            self._rows[table][name][where].copy_(rows)

    def pull(self, table: str, where: Order, source: Source, index: np.ndarray) -> None:
        """See :class:`Sink`."""
        source.store(table, index, {name: rows[where] for name, rows in self._rows[table].items()})

    def answers(self, stream: str, request: StreamRequest) -> list[Answer]:
        """See :class:`Source`; rows are those that arrived."""
        if self._patched is None:
            return [Answer(None, inverse) for inverse in request.inverse]
        present = self._present[stream]
        dense = np.cumsum(present, dtype=np.int64) - 1
        chosen = [np.flatnonzero(present[inverse]) for inverse in request.inverse]
        return [Answer(places, dense[inverse[places]]) for places, inverse in zip(chosen, request.inverse, strict=True)]

    def store(self, table: str, index: np.ndarray, out: dict[str, Tensor]) -> None:
        """See :class:`Source`."""
        for name, rows in out.items():
            copy_rows(self._rows[table][name], torch.from_numpy(index).to(self.device), rows)

    def decode(self, table: str, index: np.ndarray, out: Tensor) -> None:
        """See :class:`Source`."""
        rows = {k: self._workspace.moved(f"relayed/{k}", rows, out.device) for k, rows in self._rows[table].items()}
        gather_rows(rows, torch.from_numpy(index).to(out.device), out)


@dataclass(slots=True)
class WorkingSets:
    """The rows of this rank's own step, dequantised: ``[unique, width]`` fp32 by table."""

    out: Mapping[str, Tensor]
    workspace: Workspace
    rows: int = 0
    """Rows of all tables that arrived."""

    @property
    def device(self) -> torch.device:
        """See :class:`Sink`."""
        return next((rows.device for rows in self.out.values()), CPU)

    def begin(self, stream: str, rows: int) -> None:
        """See :class:`Sink`."""

    def locate(self, stream: str, order: Order, rows: int) -> Order:
        """See :class:`Sink`."""
        return order

    def put(self, table: str, where: Order, fields: dict[str, Tensor]) -> None:
        """See :class:`Sink`."""
        target = self._target(table, where)
        dequantize_rows(fields, target)
        self._settle(table, where, target)

    def pull(self, table: str, where: Order, source: Source, index: np.ndarray) -> None:
        """See :class:`Sink`."""
        target = self._target(table, where)
        source.decode(table, index, target)
        self._settle(table, where, target)

    def _target(self, table: str, where: Order) -> Tensor:
        out = self.out[table]
        if isinstance(where, slice):
            return out[where]
        return self.workspace.get("decoded", (len(where), out.shape[1]), out.dtype, out.device)

    def _settle(self, table: str, where: Order, target: Tensor) -> None:
        self.rows += len(target)
        if not isinstance(where, slice):
            scatter_rows(self.out[table], torch.from_numpy(where).to(target.device), target)


def allocate(
    workspace: Workspace, name: str, fields: tuple[Field, ...], rows: int, device: torch.device
) -> dict[str, Tensor]:
    """Buffers ``[rows, *shape]`` for ``fields``, by field name."""
    return {f.name: workspace.get(f"{name}/{f.name}", (rows, *f.shape), f.dtype, device) for f in fields}
