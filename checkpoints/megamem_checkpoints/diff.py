"""In what two checkpoints differ, whatever the layouts, owners and placements that wrote them. Memory stays bounded: one dense
tensor, or one chunk of a table, of each at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamem.memory.table import STATE
from megamem_checkpoints import dense, tables
from megamem_checkpoints.compare import differences
from megamem_checkpoints.manifest import TableRecord
from megamem_checkpoints.reader import CheckpointReader
from megamem_kernels.row_gather import dequantize_rows


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A dense weight, buffer or moment that is not the same bit for bit."""

    name: str
    """Canonical name; moments as ``exp_avg.<name>``."""
    largest: float | None
    """Largest absolute difference; None where it is not a number: a value is none, or there is nothing to compare with."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class TableDifference:
    """A table of which rows or their optimizer state are not the same."""

    name: str
    rows: int
    rows_changed: int = 0
    """Rows of which a value differs."""
    state_changed: int = 0
    """Rows whose optimizer state differs; all rows where the two keep different state."""
    largest: float | None = 0.0
    """Largest absolute difference of a value of a row; None where it is not a number."""
    note: str = ""


@dataclass(slots=True)
class Difference:
    """What :func:`compare_checkpoints` found."""

    settings: list[tuple[str, Any, Any]] = field(default_factory=list)
    """Settings of the run by name, with both values; None where one lacks it."""
    dense: list[TensorDifference] = field(default_factory=list)
    tables: list[TableDifference] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    """Tensors and tables that the other lacks."""
    only_in_b: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors, tables and optimizer state, bit for bit; settings do not count."""
        return not (self.dense or self.tables or self.only_in_a or self.only_in_b)


def size_of_work(a: CheckpointReader, b: CheckpointReader) -> int:
    """Values that :func:`compare_checkpoints` reads of each, without optimizer state: what ``advance`` sums up to."""
    shapes = [a.shape(name) for name in _common(a.manifest.dense, b.manifest.dense)]
    shapes += [a.tables()[name] for name in _common(a.manifest.tables, b.manifest.tables)]
    return sum(math.prod(shape) for shape in shapes)


def compare_checkpoints(
    a: CheckpointReader, b: CheckpointReader, *, advance: Callable[[int], None] = lambda done: None
) -> Difference:
    """Compare weights, buffers, moments, tables and settings. ``advance`` is told how many values have been compared.

    What lies in files of the same checksums is the same and is not read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    result = Difference(settings=list(differences(a.meta.get("config", {}), b.meta.get("config", {}))))
    for mine, theirs in ((a.manifest.dense, b.manifest.dense), (a.manifest.tables, b.manifest.tables)):
        result.only_in_a += sorted(set(mine) - set(theirs))
        result.only_in_b += sorted(set(theirs) - set(mine))
    same_files = _checksums(a, dense.FOLDER) == _checksums(b, dense.FOLDER)
    for name in _common(a.manifest.dense, b.manifest.dense):
        if not same_files:
            result.dense += _dense(a, b, name)
        advance(math.prod(a.shape(name)))
    for name in _common(a.manifest.tables, b.manifest.tables):
        result.tables += _table(a, b, name, advance)
    return result


def _common(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return sorted(set(mine) & set(theirs))


def _checksums(reader: CheckpointReader, folder: str) -> dict[str, str]:
    return {name: file.sha256 for name, file in reader.manifest.files.items() if name.startswith(folder + "/")}


def _dense(a: CheckpointReader, b: CheckpointReader, name: str) -> Iterator[TensorDifference]:
    if a.shape(name) != b.shape(name):
        yield TensorDifference(name, None, f"{list(a.shape(name))} and {list(b.shape(name))}")
        return
    mine, theirs = _states(a, name), _states(b, name)
    for key in dict.fromkeys([*mine, *theirs]):
        if key not in mine or key not in theirs:
            yield TensorDifference(key, None, f"only {'A' if key in mine else 'B'} has it")
        elif (differ := _differ(mine[key], theirs[key])).any():
            yield TensorDifference(key, _number(_largest(mine[key], theirs[key], differ)))


def _states(reader: CheckpointReader, name: str) -> dict[str, Tensor]:
    """A weight or buffer and its moments by key: whole, fp32."""
    states = [dense.MASTER, *reader.manifest.dense[name].moments]
    targets = {dense.key_of(state, name): torch.empty(reader.shape(name)) for state in states}
    dense.read(reader.dense_reader, targets)
    return targets


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Where two fp32 tensors are not the same bit for bit."""
    return a.view(torch.int32) != b.view(torch.int32)


def _largest(a: Tensor, b: Tensor, differ: Tensor) -> float:
    """Largest absolute difference there; nan where it is not a number."""
    return float(torch.where(differ, (a - b).abs(), 0.0).max())


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(
    a: CheckpointReader, b: CheckpointReader, name: str, advance: Callable[[int], None]
) -> Iterator[TableDifference]:
    mine, theirs = a.manifest.tables[name], b.manifest.tables[name]
    if (mine.rows, mine.width) != (theirs.rows, theirs.width):
        note = f"[{mine.rows}, {mine.width}] and [{theirs.rows}, {theirs.width}]"
        yield TableDifference(name, mine.rows, largest=None, note=note)
        advance(mine.rows * mine.width)
        return
    folder = f"tables/{name}"
    if mine == theirs and _checksums(a, folder) == _checksums(b, folder):
        advance(mine.rows * mine.width)
        return
    same_state = mine.state == theirs.state
    placed, placed_there = tables.placement_of(mine), tables.placement_of(theirs)
    rows_changed, state_changed, largest = 0, 0 if same_state else mine.rows, 0.0
    step = max(1, tables.READ_BYTES // (8 * mine.width))
    for start in range(0, mine.rows, step):
        here = np.arange(start, min(start + step, mine.rows))
        there = here if placed == placed_there else placed_there.positions(placed.logical(here))
        records_a = tables.read(a.table_files, mine, here, state=same_state)
        records_b = tables.read(b.table_files, theirs, there, state=same_state)
        values_a, values_b = _values(records_a, mine), _values(records_b, theirs)
        differ = _differ(values_a, values_b)
        rows_changed += int(differ.any(1).sum())
        largest = float(np.maximum(largest, _largest(values_a, values_b, differ)))  # nan stays
        if same_state:
            state_changed += _state_changed(records_a, records_b, len(here))
        advance(len(here) * mine.width)
    note = "" if same_state else "their optimizer state is not of the same kind"
    if rows_changed or state_changed:
        yield TableDifference(name, mine.rows, rows_changed, state_changed, _number(largest), note)


def _values(records: Mapping[str, Tensor], record: TableRecord) -> Tensor:
    rows = {key: tensor for key, tensor in records.items() if not key.startswith(STATE)}
    return dequantize_rows(rows, torch.empty(len(next(iter(rows.values()))), record.width))


def _state_changed(a: Mapping[str, Tensor], b: Mapping[str, Tensor], count: int) -> int:
    changed = torch.zeros(count, dtype=torch.bool)
    for key in a:
        if key.startswith(STATE):
            mine, theirs = (tensor.reshape(count, -1).view(torch.uint8) for tensor in (a[key], b[key]))
            changed |= (mine != theirs).any(1)
    return int(changed.sum())
