"""Memory tables as ranges of positions. Owners write what they hold; any cut, placement and format reads back into any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamem.errors import CheckpointError
from megamem.memory.placement import Placement
from megamem.memory.table import STATE, OwnedTable
from megamem_checkpoints.files import FILE_BYTES, write_tensors
from megamem_checkpoints.manifest import PlacementRecord, StateRecord, TableRecord
from megamem_kernels.formats import ROWS, row_fields
from megamem_kernels.rounding import quantize_rows
from megamem_kernels.row_gather import dequantize_rows

READ_BYTES = FILE_BYTES // 4
"""Upper bound of what is read at a time, or one row."""


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


def write(root: Path, table: OwnedTable, *, file_bytes: int = FILE_BYTES) -> TableRecord:
    """Save the owned positions ``[start, stop)`` and their state under ``root``, in files of at most ``file_bytes``, of which
    one is in memory at a time."""
    record = describe(table)
    row_bytes = sum(field.nbytes for field in (*table.rows.fields, *table.state.fields))
    step = max(1, file_bytes // row_bytes)
    folder = root / "tables" / table.spec.name
    for start in range(table.start, table.stop, step):
        stop = min(start + step, table.stop)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rows_{start:012d}_{stop:012d}.safetensors"
        write_tensors(path, table.read(start, stop))
        record.files[path.relative_to(root).as_posix()] = [start, stop]
    return record


def merge(parts: list[TableRecord]) -> TableRecord:
    """One record from those of all owners of a table; ValueError where they do not describe one whole table."""
    merged = replace(parts[0], files={})
    for part in parts:
        if replace(part, files={}) != replace(merged, files={}):
            raise ValueError(f"owners disagree about a table: {parts[0]} and {part}")
        merged.files.update(part.files)
    if (position := merged.gap()) is not None:
        raise ValueError(f"position {position} of {merged.rows} is not owned exactly once")
    return merged


def placement_of(record: TableRecord) -> Placement:
    """Where a saved table has its logical rows."""
    return Placement(record.placement.name, record.rows, record.placement.multiplier)


def read(root: Path, record: TableRecord, positions: np.ndarray, *, state: bool) -> dict[str, Tensor]:
    """Records at ``positions`` ``[n]`` int64, distinct and in any order, by key: as they were stored.

    Neighbouring positions are read as one range, others where they lie.

    Raises:
        CheckpointError: a file does not hold what the manifest says.
    """
    expected = {f.name: (f.dtype, list(f.shape)) for f in row_fields(record.format, record.width)}
    if state:
        expected |= {STATE + name: (getattr(torch, item.dtype), item.shape) for name, item in record.state.items()}
    out = {key: torch.empty(len(positions), *shape, dtype=dtype) for key, (dtype, shape) in expected.items()}
    order = np.argsort(positions, kind="stable")
    ascending = positions[order]
    for low, high, name in record.ranges():
        first, last = np.searchsorted(ascending, [low, high])
        if first == last:
            continue
        target, source = torch.from_numpy(order[first:last]), ascending[first:last] - low
        try:
            with safe_open(root / name, framework="pt") as file:
                for key, (dtype, shape) in expected.items():
                    saved = file.get_slice(key)
                    if saved.get_shape() != [high - low, *shape]:
                        raise _foreign(root, name, key)
                    if source[-1] - source[0] + 1 == len(source):
                        part = saved[int(source[0]) : int(source[-1]) + 1]
                    else:
                        part = _bytes(file.get_tensor(key))[torch.from_numpy(source)].view(dtype).reshape(-1, *shape)
                    if part.dtype != dtype:
                        raise _foreign(root, name, key)
                    _bytes(out[key])[target] = _bytes(part)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"file {name} of checkpoint {root} cannot be read: {error}") from error
    return out


def read_rows(root: Path, record: TableRecord, rows: np.ndarray) -> Tensor:
    """Logical rows ``[n]`` int64, distinct, as values: ``[n, width]`` fp32. Errors as in :func:`read`."""
    stored = read(root, record, placement_of(record).positions(rows), state=False)
    return dequantize_rows(stored, torch.empty(len(rows), record.width))


def restore(root: Path, record: TableRecord, table: OwnedTable, *, state: bool, label: str) -> None:
    """Fill what ``table`` owns, and its optimizer state if ``state``, whatever placement and format it was saved in.

    Rows of another format are rounded to the nearest value of the table's. Nothing is read where the table already holds
    what was committed under ``label``.
    """
    saved, wanted = placement_of(record), table.placement
    if state and table.committed == label and saved == wanted:
        return
    row_bytes = sum(field.nbytes for field in (*table.rows.fields, *table.state.fields))
    step = max(1, READ_BYTES // row_bytes)
    for start in range(table.start, table.stop, step):
        positions = np.arange(start, min(start + step, table.stop))
        if saved != wanted:
            positions = saved.positions(wanted.logical(positions))
        values = read(root, record, positions, state=state)
        if record.format != table.storage.format:
            values = _convert(values, table)
        table.write(start, values)


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


def _foreign(root: Path, name: str, key: str) -> CheckpointError:
    return CheckpointError(f"file {name} of checkpoint {root} does not hold the {key} that its manifest names")
