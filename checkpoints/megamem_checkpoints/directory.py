"""The directory of a run's checkpoints: names, which one is the latest, which ones go."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megamem.errors import CheckpointError
from megamem.files import fsync, write_text
from megamem_checkpoints.files import check_size
from megamem_checkpoints.manifest import FILE_NAME, Manifest, NewerFormatError, read_manifest

LATEST = "latest"
"""Text file that names the checkpoint to resume from."""

_ASIDE = ".replaced"
_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")
_log = logging.getLogger(__name__)


def name_of(step: int) -> str:
    """Directory name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


def open_manifest(path: Path) -> Manifest:
    """The manifest of a whole checkpoint: all files there, each of the stated length. CheckpointError otherwise."""
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        check_size(path, name, record)
    return manifest


def latest(directory: Path) -> Path | None:
    """The checkpoint that ``latest`` names, else the newest whole one; None where none was ever written.

    CheckpointError where there are checkpoints but none is whole: to start again from nothing must be asked for.
    """
    named = _named(directory)
    paths = [path for _, path in reversed(_steps(directory))]
    failures: list[str] = []
    for path in dict.fromkeys([named, *paths] if named is not None else paths):
        try:
            open_manifest(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            failures.append(str(error))
            continue
        if path != named:
            _log.warning("%s does not name a whole checkpoint; taking %s", directory / LATEST, path.name)
        return path
    if failures:
        raise CheckpointError(
            f"no whole checkpoint is left in {directory}; delete it to start again from step 0, or give this run another "
            f"name (the newest: {failures[0]})"
        )
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the latest of a run directory or its ``checkpoints``."""
    if (path / FILE_NAME).is_file():
        return path
    for directory in (path / "checkpoints", path):
        found = latest(directory) if directory.is_dir() else None
        if found is not None:
            return found
    raise CheckpointError(f"{path} has no checkpoint; name a run directory or a directory such as {name_of(100)}")


def prepare(directory: Path, temporary: Path) -> None:
    """Make an empty ``temporary``, and remove what interrupted saves left behind. The writer's lock must be held."""
    for leftover in leftovers(directory):
        shutil.rmtree(leftover)
    (temporary / "rng").mkdir(parents=True)
    (temporary / "dense").mkdir()
    (temporary / "tables").mkdir()


def publish(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name. One of the same name is moved aside first and stays readable until then."""
    for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
        fsync(folder)
    if final.exists():
        replaced = final.with_name(final.name + _ASIDE)
        delete(replaced)
        final.rename(replaced)
    temporary.rename(final)
    fsync(final.parent)
    write_text(final.parent / LATEST, final.name + "\n")


def prunable(
    directory: Path,
    *,
    keep: int,
    keep_every: int = 0,
    step: int | None = None,
    whole: Callable[[Path], bool] | None = None,
) -> list[Path]:
    """What may go when the newest ``keep`` whole checkpoints stay, oldest first.

    Everything older than these goes, and what was moved aside for a new checkpoint of the same step; but never one whose step
    is a multiple of ``keep_every`` (0: no such step), nor the one that ``latest`` names. A damaged one does not count as kept,
    so that damage never costs the last whole one: ``whole`` decides, by default :func:`is_whole`, which knows lengths alone. With
    ``step``, later ones are as if they were not there.
    """
    kept, older = 0, []
    for number, path in reversed(_steps(directory)):
        if step is not None and number > step:
            continue
        if kept == keep or (kept and _is_aside(path)):
            older.append((number, path))
        elif (whole or is_whole)(path) and not _is_aside(path):
            kept += 1
    named = _named(directory)
    return [
        path
        for number, path in reversed(older)
        if path != named and (not keep_every or number % keep_every or _is_aside(path))
    ]


def prune(directory: Path, *, keep: int, keep_every: int = 0, step: int | None = None) -> None:
    """Delete what :func:`prunable` names. The writer's lock must be held."""
    for path in prunable(directory, keep=keep, keep_every=keep_every, step=step):
        delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, or a leftover of one: its name goes first, so that no half-deleted checkpoint is ever visible."""
    if not path.exists():
        return
    if path.suffix != ".tmp":
        path = path.rename(path.with_name(path.name + ".tmp"))
    shutil.rmtree(path)


def leftovers(directory: Path) -> list[Path]:
    """What killed saves and deletions left behind, or, while somebody holds the writer's lock, what they are busy with."""
    return sorted(directory.glob("step_*.tmp"))


def steps(directory: Path) -> list[Path]:
    """All checkpoints, whole or not, oldest first; not those that were moved aside."""
    return [path for _, path in _steps(directory) if not _is_aside(path)]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint of a format that this megamem reads has all of its files, each of the stated length."""
    try:
        open_manifest(path)
    except CheckpointError:
        return False
    return True


def _is_aside(path: Path) -> bool:
    return path.name.endswith(_ASIDE)


def _named(directory: Path) -> Path | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = (directory / LATEST).read_text(encoding="utf-8").strip()
        if _NAME.fullmatch(name):
            return directory / name
    return None


def _steps(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, oldest first; one that was moved aside comes before its replacement."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), not match[2], path))
    return [(step, path) for step, _, path in sorted(found)]
