"""Files that are durable and checked: flush, checksum, rename, lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from megamem.errors import CheckpointError
from megamem_checkpoints.manifest import FileRecord

T = TypeVar("T")
R = TypeVar("R")

FILE_BYTES = 256 * 2**20
"""Upper bound of one file of dense tensors, or one tensor."""


def in_parallel(threads: int, job: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``job`` of every item, ``threads`` at a time, in their order. After an error no further item is begun, and the first is
    raised."""
    with ThreadPoolExecutor(threads, thread_name_prefix="megamem-io") as pool:
        return list(pool.map(job, items))


def record(path: Path) -> FileRecord:
    """Size and checksum of a file, read back from where it was written."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(bytes=os.fstat(file.fileno()).st_size, sha256=digest.hexdigest())


def check_size(root: Path, name: str, expected: FileRecord) -> None:
    """CheckpointError naming the file where it is missing or of another length."""
    try:
        size = (root / name).stat().st_size
    except OSError as error:
        raise _damaged(root, name, "missing" if isinstance(error, FileNotFoundError) else "not readable") from error
    if size != expected.bytes:
        raise _damaged(root, name, f"{size} bytes long in place of {expected.bytes}")


def check_content(root: Path, name: str, expected: FileRecord) -> None:
    """CheckpointError naming the file where its content is not what was written."""
    check_size(root, name, expected)
    try:
        found = record(root / name)
    except OSError as error:
        raise _damaged(root, name, "not readable") from error
    if found != expected:
        raise _damaged(root, name, "not what was written (its sha256 differs)")


def share(records: dict[str, FileRecord], rank: int, ranks: int) -> Iterable[str]:
    """The files that ``rank`` checks, so that all ranks together read every file once and about equally much."""
    loads = [0] * ranks
    for name in sorted(records, key=lambda name: (-records[name].bytes, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += records[name].bytes
        if lightest == rank:
            yield name


@contextlib.contextmanager
def writer_lock(directory: Path, *, doing: str = "writing a checkpoint into") -> Iterator[None]:
    """Hold the only right to write into ``directory``; the system gives it back when the process ends, however it
    ends. ``doing`` says in the error what the other process does there.
    """
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is {doing} {directory}; stop it or give this run another name"
            ) from None
        yield


def _damaged(root: Path, name: str, what: str) -> CheckpointError:
    if not root.exists():
        return CheckpointError(
            f"checkpoint {root} was deleted while it was read, as a run that trains does with old ones; give the command again"
        )
    return CheckpointError(
        f"file {name} of checkpoint {root} is {what}; delete {root} to go back to the checkpoint before it"
    )
