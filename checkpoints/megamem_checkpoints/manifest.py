"""The manifest: what a checkpoint consists of, as one JSON file. A directory without a valid one is no checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megamem.config.base import build
from megamem.errors import CheckpointError, ConfigError

FORMAT_VERSION = 3
"""Raised when an older megamem could misread what this one writes. Version 1 had fp32 tables in the order of their rows,
version 2 no increments."""

FILE_NAME = "manifest.json"


class NewerFormatError(CheckpointError):
    """The checkpoint is whole, but a newer megamem wrote it: falling back to an older one would lose work silently."""


@dataclass(kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(kw_only=True, slots=True)
class DenseRecord:
    """One dense tensor under its canonical name."""

    shape: list[int]
    """Global shape, whatever the layout that wrote it."""
    moments: list[str] = field(default_factory=list)
    """Optimizer state tensors of the same shape that were saved with it; none for buffers."""


@dataclass(kw_only=True, slots=True)
class StateRecord:
    """One optimizer state tensor of a table."""

    shape: list[int]
    """Shape of one row of it: ``[]`` for one number per row."""
    dtype: str


@dataclass(kw_only=True, slots=True)
class PlacementRecord:
    """Where logical rows lie: ``position = row * multiplier % rows``."""

    name: Literal["contiguous", "scrambled"] = "contiguous"
    multiplier: int = 1


@dataclass(kw_only=True, slots=True)
class IncrementRecord:
    """A file of whole records that replace those of the same positions in all files before it."""

    file: str
    """Relative name. Beside the fields of the records it has their ``positions``, int64, ascending and distinct."""
    start: int
    """Least position in it."""
    stop: int
    """One past the largest."""
    count: int
    """Number of records."""


@dataclass(kw_only=True, slots=True)
class TableRecord:
    """One memory table and the ranges of positions it was cut into."""

    rows: int
    width: int
    format: Literal["fp32", "bf16", "fp8"] = "fp32"
    """How rows are stored, see :func:`megamem_kernels.formats.row_fields`."""
    placement: PlacementRecord = field(default_factory=PlacementRecord)
    state: dict[str, StateRecord]
    files: dict[str, list[int]]
    """Relative file name to ``[start, stop)`` in positions."""
    increments: list[IncrementRecord] = field(default_factory=list)
    """What changed since ``files`` were written. A later one that has a position counts."""

    def names(self) -> list[str]:
        """All of its files."""
        return [*self.files, *(item.file for item in self.increments)]

    def ranges(self) -> list[tuple[int, int, str]]:
        """``(start, stop, file)`` in the order of positions."""
        return sorted((start, stop, name) for name, (start, stop) in self.files.items())

    def gap(self) -> int | None:
        """The first position that ``files`` store not exactly once, or None."""
        expected = 0
        for start, stop, _ in self.ranges():
            if start != expected or stop <= start:
                return expected
            expected = stop
        return None if expected == self.rows else expected


@dataclass(kw_only=True, slots=True)
class Manifest:
    """Everything that is known about a checkpoint without opening its tensors."""

    format_version: int
    megamem_version: str
    step: int
    world_size: int
    meta: dict[str, Any]
    """Plain JSON of the run: configuration, data state, counters, layout."""
    files: dict[str, FileRecord]
    dense: dict[str, DenseRecord]
    tables: dict[str, TableRecord]
    chain: int = 0
    """Saves in a row, this one the last, whose tables may share files with the save before; 0: it shares none with any."""

    def label(self, directory: Path) -> str:
        """What tells the checkpoint in ``directory`` from any other: disk files of tables are committed under it."""
        return f"{directory.name}:{_checksum(plain_json(asdict(self)))}"

    def dumps(self) -> str:
        """The file's text, with a checksum over everything else in it."""
        body = plain_json(asdict(self))
        return json.dumps({**body, "manifest_sha256": _checksum(body)}, indent=1, sort_keys=True) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of ``directory``; CheckpointError naming the file where it is missing, damaged or of a newer
    format.
    """
    path = directory / FILE_NAME
    try:
        body = json.loads(path.read_bytes())
        version = body["format_version"]
        stated = body.pop("manifest_sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {FILE_NAME}; name a whole one") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"it cannot be read ({type(error).__name__})") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format version {version}, written by megamem {body.get('megamem_version')}, and this megamem "
            f"reads up to version {FORMAT_VERSION}; update megamem"
        )
    if stated != _checksum(body):
        raise _damaged(path, "its checksum is wrong")
    try:
        manifest = build(Manifest, body)
    except (ConfigError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    for name, table in manifest.tables.items():
        if (row := table.gap()) is not None:
            raise _damaged(path, f"position {row} of table {name} is not stored exactly once")
        if math.gcd(table.placement.multiplier, table.rows) != 1:
            raise _damaged(path, f"the placement of table {name} is no bijection of its {table.rows} rows")
        for item in table.increments:
            if not (0 <= item.start < item.stop <= table.rows and 0 < item.count <= item.stop - item.start):
                raise _damaged(path, f"increment {item.file} is not of positions of table {name}")
        for file in table.names():
            if file not in manifest.files:
                raise _damaged(path, f"it states no checksum of {file}")
    return manifest


def plain_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as it reads back from JSON (tuples become lists, keys text); TypeError where it is not plain data."""
    return json.loads(json.dumps(value))


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}; delete {path.parent} to go back to the checkpoint before it")
