"""Memory tables as ranges of rows. Owners write their own rows; any cut of the rows reads back into any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamem.errors import CheckpointError
from megamem_checkpoints.files import FILE_BYTES, write_tensors
from megamem_checkpoints.manifest import StateRecord, TableRecord

if TYPE_CHECKING:
    from megamem.memory.table import OwnedTable

ROWS = "rows"
"""Key of the rows in a file; optimizer state tensors are ``state.<name>``."""


def state_key(name: str) -> str:
    """Key of an optimizer state tensor in a file."""
    return f"state.{name}"


def describe(table: OwnedTable) -> TableRecord:
    """The record of ``table`` without files: what a checkpoint of it must agree with."""
    state = {
        name: StateRecord(shape=list(tensor.shape[1:]), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in table.state.items()
    }
    return TableRecord(rows=table.spec.rows, width=table.spec.width, state=state, files={})


def write(root: Path, table: OwnedTable, *, file_bytes: int = FILE_BYTES) -> TableRecord:
    """Save the owned rows ``[start, stop)`` and their state under ``root``, in files of at most ``file_bytes``."""
    record = describe(table)
    tensors = {ROWS: table.rows, **{state_key(name): tensor for name, tensor in table.state.items()}}
    row_bytes = sum(tensor[:1].nbytes for tensor in tensors.values())
    step = max(1, file_bytes // max(1, row_bytes))
    folder = root / "tables" / table.spec.name
    for start in range(table.start, table.stop, step):
        stop = min(start + step, table.stop)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rows_{start:012d}_{stop:012d}.safetensors"
        cut = slice(start - table.start, stop - table.start)
        write_tensors(path, {key: tensor.detach()[cut].contiguous() for key, tensor in tensors.items()})
        record.files[path.relative_to(root).as_posix()] = [start, stop]
    return record


def merge(parts: list[TableRecord]) -> TableRecord:
    """One record from those of all owners of a table; ValueError where they do not describe one whole table."""
    first = parts[0]
    merged = TableRecord(rows=first.rows, width=first.width, state=first.state, files={})
    for part in parts:
        if (part.rows, part.width, part.state) != (first.rows, first.width, first.state):
            raise ValueError(f"owners disagree about a table: {first} and {part}")
        merged.files.update(part.files)
    if (row := merged.gap()) is not None:
        raise ValueError(f"row {row} of {merged.rows} is not owned exactly once")
    return merged


def read(
    root: Path, record: TableRecord, start: int, stop: int, *, state: bool
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Rows ``[start, stop)`` file by file: ``(first row, {key: tensor})`` with ``state`` or without.

    CheckpointError naming the file where one does not hold what the manifest says.
    """
    expected = {ROWS: ([record.width], "float32")}
    if state:
        expected |= {state_key(name): (item.shape, item.dtype) for name, item in record.state.items()}
    for low, high, name in record.ranges():
        first, last = max(low, start), min(high, stop)
        if first >= last:
            continue
        try:
            with safe_open(root / name, framework="pt") as file:
                part = {key: file.get_slice(key)[first - low : last - low] for key in expected}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"file {name} of checkpoint {root} cannot be read: {error}") from error
        for key, (shape, dtype) in expected.items():
            if list(part[key].shape) != [last - first, *shape] or part[key].dtype != getattr(torch, dtype):
                raise CheckpointError(
                    f"file {name} of checkpoint {root} does not hold the {key} that its manifest names"
                )
        yield first, part


def restore(root: Path, record: TableRecord, table: OwnedTable, *, state: bool) -> None:
    """Fill the owned rows of ``table``, and their optimizer state if ``state``."""
    for first, part in read(root, record, table.start, table.stop, state=state):
        for key, tensor in part.items():
            target = table.rows if key == ROWS else table.state[key.removeprefix(state_key(""))]
            offset = first - table.start
            with torch.no_grad():
                target[offset : offset + len(tensor)].copy_(tensor)
