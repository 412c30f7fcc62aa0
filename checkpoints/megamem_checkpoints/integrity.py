"""Reading every byte of checkpoints: which files are not what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megamem.errors import CheckpointError
from megamem_checkpoints.files import check_content
from megamem_checkpoints.manifest import FILE_NAME, FileRecord, read_manifest


@dataclass(slots=True)
class Checked:
    """What was found out about one checkpoint."""

    path: Path
    files: int
    """Files that its manifest names; 0 where the manifest cannot be read."""
    bytes: int
    damaged: dict[str, str] = field(default_factory=dict)
    """Relative name of each bad file to what is wrong with it."""
    gone: bool = False
    """It was deleted meanwhile, as a run that trains does with old ones: nothing is said about it."""


class Verification:
    """Checks lengths and sha256 of every file of ``paths``. A file that several of them share by hard links is read once.

    ``bytes`` is what :meth:`run` will read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.results: list[Checked] = []
        self._work: dict[tuple[object, ...], list[tuple[Checked, str, FileRecord]]] = {}
        for path in paths:
            try:
                files = read_manifest(path).files
            except CheckpointError as error:
                self.results.append(Checked(path, 0, 0, {FILE_NAME: str(error)}))
                continue
            result = Checked(path, len(files), sum(record.bytes for record in files.values()))
            self.results.append(result)
            for name, record in files.items():
                self._work.setdefault(_identity(path / name, record), []).append((result, name, record))
        self.bytes = sum(uses[0][2].bytes for uses in self._work.values())

    def run(self, *, threads: int, advance: Callable[[int], None] = lambda done: None) -> list[Checked]:
        """Read with ``threads`` at once; ``advance`` is told the bytes of each file that is done. Results in order of paths."""
        largest_first = sorted(self._work.values(), key=lambda uses: -uses[0][2].bytes)
        with ThreadPoolExecutor(threads) as pool:
            for uses, problem in zip(largest_first, pool.map(_problem, largest_first), strict=True):
                for result, name, _ in uses if problem else ():
                    result.damaged[name] = problem
                advance(uses[0][2].bytes)
        for result in self.results:
            if result.damaged and not result.path.exists():
                result.gone, result.damaged = True, {}
        return self.results


def _problem(uses: Sequence[tuple[Checked, str, FileRecord]]) -> str:
    for result, name, record in uses:
        try:
            check_content(result.path, name, record)
        except CheckpointError as error:
            # Deleting a checkpoint takes one name away from a file that others still have.
            if result.path.exists():
                return str(error)
        else:
            return ""
    return "deleted meanwhile"


def _identity(path: Path, record: FileRecord) -> tuple[object, ...]:
    """Equal for files that need one check: the same data under names that claim the same of it."""
    try:
        status = path.stat()
    except OSError:
        return (path,)
    return (status.st_dev, status.st_ino, record.bytes, record.sha256)
