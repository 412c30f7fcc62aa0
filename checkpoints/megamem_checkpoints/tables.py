"""Memory tables as ranges of positions. Owners write what they hold; any cut, placement and format reads back into any other."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamem.errors import CheckpointError
from megamem.memory.placement import Placement
from megamem.memory.table import STATE, OwnedTable
from megamem_checkpoints.files import in_parallel
from megamem_checkpoints.manifest import IncrementRecord, PlacementRecord, StateRecord, TableRecord
from megamem_kernels.formats import ROWS, row_fields
from megamem_kernels.rounding import quantize_rows
from megamem_kernels.row_gather import dequantize_rows

READ_BYTES = 64 * 2**20
"""Upper bound of what is read at a time, or one row."""

_INCREMENTS_OPEN = 64

POSITIONS = "positions"
"""Key of the positions of an increment."""

Fields = dict[str, tuple[torch.dtype, list[int]]]
"""By key, dtype and shape of one record."""


def describe(table: OwnedTable) -> TableRecord:
    """The record of ``table`` without files: what a checkpoint of it must agree with."""
    return TableRecord(
        rows=table.spec.rows,
        width=table.spec.width,
        format=table.storage.format,
        placement=PlacementRecord(name=table.placement.name, multiplier=table.placement.multiplier),
        state={
            field.name: StateRecord(shape=list(field.shape), dtype=str(field.dtype).removeprefix("torch."))
            for field in table.state.fields
        },
        files={},
    )


def merge(parts: list[TableRecord]) -> TableRecord:
    """One record from those of all owners of a table; ValueError where they do not describe one whole table."""
    merged = without_files(parts[0])
    for part in parts:
        if without_files(part) != without_files(merged):
            raise ValueError(f"owners disagree about a table: {parts[0]} and {part}")
        merged.files.update(part.files)
        merged.increments += part.increments
    if (position := merged.gap()) is not None:
        raise ValueError(f"position {position} of {merged.rows} is not owned exactly once")
    return merged


def without_files(record: TableRecord) -> TableRecord:
    """What owners of one table agree about."""
    return replace(record, files={}, increments=[])


def part_of(record: TableRecord, start: int, stop: int) -> TableRecord | None:
    """The part of ``record`` that is of positions ``[start, stop)``; None where a file has others as well."""
    files = {name: cut for name, cut in record.files.items() if cut[0] < stop and start < cut[1]}
    increments = [item for item in record.increments if item.start < stop and start < item.stop]
    cuts = [*files.values(), *([item.start, item.stop] for item in increments)]
    if any(low < start or stop < high for low, high in cuts):
        return None
    return replace(record, files=files, increments=increments)


def placement_of(record: TableRecord) -> Placement:
    """Where a saved table has its logical rows."""
    return Placement(record.placement.name, record.rows, record.placement.multiplier)


class OpenFiles:
    """Files of the tables of one checkpoint, mapped into memory. Increments, of which every chunk of a table may need some, stay
    open, the most recently used of them. Threads may share it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._increments: OrderedDict[str, _File] = OrderedDict()
        self._lock = Lock()

    def base(self, name: str, count: int) -> _File:
        """A file of ``count`` records."""
        return _open(self._root, name, count)

    def increment(self, item: IncrementRecord) -> _File:
        """A file with positions."""
        with self._lock:
            file = self._increments.pop(item.file, None)
            if file is None:
                file = _open(self._root, item.file, item.count)
                file.check_positions(item)
            self._increments[item.file] = file
            if len(self._increments) > _INCREMENTS_OPEN:
                self._increments.popitem(last=False)
        return file


def read(files: OpenFiles, record: TableRecord, positions: range | np.ndarray, *, state: bool) -> dict[str, Tensor]:
    """Records at ``positions``, a range of step 1 or distinct int64 ``[n]`` in any order, by key: as they were stored.

    Not to be written to: they may be the file itself, mapped into memory.

    Raises:
        CheckpointError: a file does not hold what the manifest says.
    """
    fields: Fields = {f.name: (f.dtype, list(f.shape)) for f in row_fields(record.format, record.width)}
    if state:
        fields |= {STATE + name: (getattr(torch, item.dtype), item.shape) for name, item in record.state.items()}
    if isinstance(positions, range):
        return _read_range(files, record, fields, positions)
    out = {key: torch.empty(len(positions), *shape, dtype=dtype) for key, (dtype, shape) in fields.items()}
    order = np.argsort(positions, kind="stable")
    ascending = positions[order]
    for low, high, name in record.ranges():
        first, last = np.searchsorted(ascending, [low, high])
        if first < last:
            file = files.base(name, high - low)
            _copy(file, fields, ascending[first:last] - low, order[first:last], out)
    for item in record.increments:
        first, last = np.searchsorted(ascending, [item.start, item.stop])
        if first < last:
            file = files.increment(item)
            source = np.searchsorted(file.positions, ascending[first:last])
            found = file.positions[source] == ascending[first:last]
            _copy(file, fields, source[found], order[first:last][found], out)
    return out


def _read_range(files: OpenFiles, record: TableRecord, fields: Fields, wanted: range) -> dict[str, Tensor]:
    parts = [(low, high, name) for low, high, name in record.ranges() if low < wanted.stop and wanted.start < high]
    changes: list[tuple[_File, slice]] = []
    for item in record.increments:
        if item.start < wanted.stop and wanted.start < item.stop:
            file = files.increment(item)
            first, last = (int(edge) for edge in np.searchsorted(file.positions, [wanted.start, wanted.stop]))
            if first < last:
                changes.append((file, slice(first, last)))
    out: dict[str, Tensor] = {}
    if len(parts) != 1 or changes:
        out = {key: torch.empty(len(wanted), *shape, dtype=dtype) for key, (dtype, shape) in fields.items()}
    for low, high, name in parts:
        start, stop = max(low, wanted.start), min(high, wanted.stop)
        file = files.base(name, high - low)
        for key, (dtype, shape) in fields.items():
            part = file.field(key, dtype, shape)[start - low : stop - low]
            if key in out:
                out[key][start - wanted.start : stop - wanted.start].copy_(part)
            else:
                out[key] = part
    for file, source in changes:
        _copy(file, fields, source, file.positions[source] - wanted.start, out)
    return out


def _copy(
    file: _File, fields: Fields, source: slice | np.ndarray, target: np.ndarray, out: Mapping[str, Tensor]
) -> None:
    """Copy records ``source`` of a file to places ``target`` of ``out``."""
    for key, (dtype, shape) in fields.items():
        _records(out[key])[target] = _records(file.field(key, dtype, shape))[source]


def restore(root: Path, record: TableRecord, table: OwnedTable, *, state: bool, label: str, threads: int = 1) -> None:
    """Fill what ``table`` owns, and its optimizer state if ``state``, whatever placement and format it was saved in.

    Rows of another format are rounded to the nearest value of the table's. Nothing is read where the table already holds
    what was committed under ``label``. Each of ``threads`` has up to :data:`READ_BYTES` in memory.
    """
    saved, wanted = placement_of(record), table.placement
    if state and table.committed == label and saved == wanted:
        return
    files, step = OpenFiles(root), max(1, READ_BYTES // table.record_bytes)
    # Pieces of one file each need no memory of their own.
    edges = [(low, high) for low, high, _ in record.ranges()] if saved == wanted else [(table.start, table.stop)]
    cuts = [(max(low, table.start), min(high, table.stop)) for low, high in edges]

    def fill(piece: range) -> None:
        positions: range | np.ndarray = piece
        if saved != wanted:
            positions = saved.positions(wanted.logical(np.arange(piece.start, piece.stop)))
        values = read(files, record, positions, state=state)
        if record.format != table.storage.format:
            values = _convert(values, table)
        table.write(piece.start, values)

    pieces = [range(at, min(at + step, high)) for low, high in cuts for at in range(low, high, step)]
    in_parallel(threads, fill, pieces)


def _convert(values: dict[str, Tensor], table: OwnedTable) -> dict[str, Tensor]:
    """The same records with their rows in the format of ``table``."""
    state = {key: tensor for key, tensor in values.items() if key.startswith(STATE)}
    rows = {key: tensor for key, tensor in values.items() if key not in state}
    count = len(rows[ROWS])
    fields = {field.name: field.allocate(count) for field in table.rows.fields}
    quantize_rows(dequantize_rows(rows, torch.empty(count, table.spec.width)), fields)
    return {**fields, **state}


def _records(tensor: Tensor) -> np.ndarray:
    """``[n]`` opaque records over the same memory, contiguous: numpy copies them whole, whatever their dtype."""
    size = math.prod(tensor.shape[1:]) * tensor.element_size()
    return tensor.reshape(-1).view(torch.uint8).numpy().view(np.dtype((np.void, size)))


@dataclass(frozen=True, slots=True)
class _File:
    """A file of ``count`` records, mapped into memory for as long as one of its tensors is in use."""

    root: Path
    name: str
    count: int
    tensors: Mapping[str, Tensor]

    @property
    def positions(self) -> np.ndarray:
        """int64, ascending."""
        return self.tensors[POSITIONS].numpy()

    def field(self, key: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        """``[count, *shape]``, or CheckpointError."""
        tensor = self.tensors.get(key)
        if tensor is None or tensor.dtype != dtype or list(tensor.shape) != [self.count, *shape]:
            raise CheckpointError(
                f"file {self.name} of checkpoint {self.root} does not hold the {key} that its manifest names"
            )
        return tensor

    def check_positions(self, item: IncrementRecord) -> None:
        """CheckpointError unless they are ascending, and from the first to the last that ``item`` states."""
        positions = self.field(POSITIONS, torch.int64, []).numpy()
        if positions[0] != item.start or positions[-1] != item.stop - 1 or (positions[1:] <= positions[:-1]).any():
            raise CheckpointError(
                f"file {self.name} of checkpoint {self.root} does not hold the positions that its manifest names"
            )


def _open(root: Path, name: str, count: int) -> _File:
    try:
        with safe_open(root / name, framework="pt") as file:
            return _File(root, name, count, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"file {name} of checkpoint {root} cannot be read: {error}") from error
