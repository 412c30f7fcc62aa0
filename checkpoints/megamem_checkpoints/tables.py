"""Memory tables as ranges of positions. Owners write what they hold; any cut, placement and format reads back into any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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


def read(root: Path, record: TableRecord, positions: np.ndarray, *, state: bool) -> dict[str, Tensor]:
    """Records at ``positions`` ``[n]`` int64, distinct and in any order, by key: as they were stored.

    Neighbouring positions are read as one range, others where they lie.

    Raises:
        CheckpointError: a file does not hold what the manifest says.
    """
    fields: Fields = {f.name: (f.dtype, list(f.shape)) for f in row_fields(record.format, record.width)}
    if state:
        fields |= {STATE + name: (getattr(torch, item.dtype), item.shape) for name, item in record.state.items()}
    out = {key: torch.empty(len(positions), *shape, dtype=dtype) for key, (dtype, shape) in fields.items()}
    order = np.argsort(positions, kind="stable")
    ascending = positions[order]
    for low, high, name in record.ranges():
        first, last = np.searchsorted(ascending, [low, high])
        if first < last:
            with _opened(root, name) as file:
                _copy(file, high - low, fields, ascending[first:last] - low, order[first:last], out)
    for item in record.increments:
        first, last = np.searchsorted(ascending, [item.start, item.stop])
        if first < last:
            with _opened(root, item.file) as file:
                changed = _positions(file, item)
                _, source, target = np.intersect1d(
                    changed, ascending[first:last], assume_unique=True, return_indices=True
                )
                if len(source):
                    _copy(file, item.count, fields, source, order[first:last][target], out)
    return out


def _copy(
    file: _File, count: int, fields: Fields, source: np.ndarray, target: np.ndarray, out: dict[str, Tensor]
) -> None:
    """Copy records ``source`` (ascending) of a file of ``count`` to places ``target`` of ``out``."""
    where = torch.from_numpy(target)
    for key, (dtype, shape) in fields.items():
        saved = file.tensors.get_slice(key)
        if saved.get_shape() != [count, *shape]:
            raise file.foreign(key)
        if source[-1] - source[0] + 1 == len(source):
            part = saved[int(source[0]) : int(source[-1]) + 1]
        else:
            part = _bytes(file.tensors.get_tensor(key))[torch.from_numpy(source)].view(dtype).reshape(-1, *shape)
        if part.dtype != dtype:
            raise file.foreign(key)
        _bytes(out[key])[where] = _bytes(part)


def _positions(file: _File, item: IncrementRecord) -> np.ndarray:
    saved = file.tensors.get_tensor(POSITIONS)
    if saved.dtype != torch.int64 or list(saved.shape) != [item.count]:
        raise file.foreign(POSITIONS)
    positions: np.ndarray = saved.numpy()
    if positions[0] != item.start or positions[-1] != item.stop - 1 or (np.diff(positions) <= 0).any():
        raise file.foreign(POSITIONS)
    return positions


def read_rows(root: Path, record: TableRecord, rows: np.ndarray) -> Tensor:
    """Logical rows ``[n]`` int64, distinct, as values: ``[n, width]`` fp32. Errors as in :func:`read`."""
    stored = read(root, record, placement_of(record).positions(rows), state=False)
    return dequantize_rows(stored, torch.empty(len(rows), record.width))


def restore(root: Path, record: TableRecord, table: OwnedTable, *, state: bool, label: str, threads: int = 1) -> None:
    """Fill what ``table`` owns, and its optimizer state if ``state``, whatever placement and format it was saved in.

    Rows of another format are rounded to the nearest value of the table's. Nothing is read where the table already holds
    what was committed under ``label``. Each of ``threads`` has up to :data:`READ_BYTES` in memory.
    """
    saved, wanted = placement_of(record), table.placement
    if state and table.committed == label and saved == wanted:
        return
    step = max(1, READ_BYTES // table.record_bytes)

    def fill(start: int) -> None:
        positions = np.arange(start, min(start + step, table.stop))
        if saved != wanted:
            positions = saved.positions(wanted.logical(positions))
        values = read(root, record, positions, state=state)
        if record.format != table.storage.format:
            values = _convert(values, table)
        table.write(start, values)

    in_parallel(threads, fill, range(table.start, table.stop, step))


def _convert(values: dict[str, Tensor], table: OwnedTable) -> dict[str, Tensor]:
    """The same records with their rows in the format of ``table``."""
    state = {key: tensor for key, tensor in values.items() if key.startswith(STATE)}
    rows = {key: tensor for key, tensor in values.items() if key not in state}
    count = len(rows[ROWS])
    fields = {field.name: field.allocate(count) for field in table.rows.fields}
    quantize_rows(dequantize_rows(rows, torch.empty(count, table.spec.width)), fields)
    return {**fields, **state}


def _bytes(tensor: Tensor) -> Tensor:
    """``[n, bytes]`` uint8 over the same memory: fp8 tensors cannot be indexed."""
    return tensor.reshape(len(tensor), -1).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class _File:
    """An open file of a checkpoint."""

    root: Path
    name: str
    tensors: Any

    def foreign(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"file {self.name} of checkpoint {self.root} does not hold the {key} that its manifest names"
        )


@contextmanager
def _opened(root: Path, name: str) -> Iterator[_File]:
    try:
        with safe_open(root / name, framework="pt") as tensors:
            yield _File(root, name, tensors)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"file {name} of checkpoint {root} cannot be read: {error}") from error
