"""What lies in a directory of checkpoints: a line for each, and what it takes on the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamem.errors import CheckpointError
from megamem_checkpoints import directory as directories
from megamem_checkpoints.manifest import Manifest

_DEGREES = ("tp", "pp", "vpp", "cp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint, whole or not."""

    path: Path
    latest: bool
    """Whether a resume starts from it."""
    saved: float
    """Seconds since 1970 when it was completed."""
    bytes: int
    """Size of its files."""
    own_bytes: int
    """Bytes that deleting it would free: what no other checkpoint shares by hard links."""
    problem: str = ""
    """Why it is not whole; empty where all of its files are there, each of the stated length."""
    step: int | None = None
    world_size: int | None = None
    layout: str = ""
    """Degrees of parallelism above 1, such as ``tp2 pp2``."""
    tables: int = 0
    incremental_tables: int = 0
    """Tables of which a part was saved as rows that had changed."""


def list_checkpoints(directory: Path) -> list[Listed]:
    """The checkpoints of ``directory``, oldest first; those that disappear meanwhile are left out."""
    try:
        latest = directories.latest(directory)
    except CheckpointError:
        latest = None
    return [listed for path in directories.steps(directory) for listed in _listed(path, latest)]


def _listed(path: Path, latest: Path | None) -> Iterator[Listed]:
    try:
        saved = path.stat().st_mtime
    except FileNotFoundError:
        return
    size, own = disk_usage([path])
    try:
        manifest = directories.open_manifest(path)
    except CheckpointError as error:
        if path.exists():
            yield Listed(path, path == latest, saved, size, own, problem=str(error))
        return
    yield Listed(
        path,
        path == latest,
        saved,
        size,
        own,
        step=manifest.step,
        world_size=manifest.world_size,
        layout=_layout(manifest),
        tables=len(manifest.tables),
        incremental_tables=sum(bool(table.increments) for table in manifest.tables.values()),
    )


def disk_usage(paths: Iterable[Path]) -> tuple[int, int]:
    """Bytes of all files below ``paths``, each counted once, and those that deleting all of them would free: a file with a
    hard link elsewhere stays."""
    found: dict[tuple[int, int], list[int]] = {}
    for path in paths:
        for file in _files(path):
            try:
                status = file.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                found.setdefault((status.st_dev, status.st_ino), [status.st_size, status.st_nlink, 0])[2] += 1
    total = sum(size for size, _, _ in found.values())
    return total, sum(size for size, links, seen in found.values() if seen >= links)


def _files(path: Path) -> Iterator[Path]:
    """Everything below ``path`` but directories; ones that disappear meanwhile are passed over, which ``rglob`` does not do."""
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def _layout(manifest: Manifest) -> str:
    layout: Any = manifest.meta.get("layout")
    if not isinstance(layout, dict):
        return ""
    return " ".join(f"{name}{layout[name]}" for name in _DEGREES if layout.get(name, 1) > 1)
