"""The directory of prepared data: what was asked for, whether it is there already, and how it appears all at once."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamem.config.base import to_dict
from megamem.errors import DataError
from megamem.files import fsync
from megamem_data.config import DataConfig
from megamem_data.prepared import MANIFEST, PreparedData
from megamem_data.sources import list_files
from megamem_data.tokenizer import open_tokenizer

_LEVELS = "levels of memory.bank.units"
_TREE_SETTINGS = ("memory.bank.branching", _LEVELS, "data.cluster_dimensions", "data.encoder")


def describe_request(config: DataConfig, *, branching: int, levels: int, seed: int, strict: bool) -> dict[str, Any]:
    """Everything that decides the result, as settings and values."""
    request: dict[str, Any] = {}
    for number, source in enumerate(config.sources):
        where = f"data.sources[{number}]"
        request |= {f"{where}.{name}": value for name, value in to_dict(source).items()}
        if source.kind != "datasets":
            request[f"{where} files"] = _describe_listing(list_files(source, where))
    tokenizer = config.tokenizer
    if tokenizer.model:
        request["data.tokenizer.model"] = open_tokenizer(tokenizer.model).fingerprint
    else:
        request |= {f"data.tokenizer.{name}": value for name, value in to_dict(tokenizer).items()}
    request |= {"data.validation_fraction": config.validation_fraction, "data.shard_tokens": config.shard_tokens}
    request |= {"train.seed": seed, "strict": strict}
    if levels:
        request |= zip(_TREE_SETTINGS, (branching, levels, config.cluster_dimensions, config.encoder), strict=True)
    return request


def _describe_listing(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", errors="surrogateescape"))
    return f"{len(files)} files with hash {digest.hexdigest()[:16]}"


def finished(path: Path, request: dict[str, Any]) -> PreparedData | None:
    """The data at ``path`` where it answers ``request``, None where there is nothing yet."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / MANIFEST).is_file():
        raise DataError(f"data.path={path} exists and is no prepared data; set another data.path")
    prepared = PreparedData.open(path)
    found = prepared.manifest.request
    differing = [
        name
        for name in sorted(request.keys() | (found.keys() - set(_TREE_SETTINGS)))
        if found.get(name) != request.get(name) and not (name == _LEVELS and prepared.levels >= request[_LEVELS])
    ]
    if differing:
        name, others = differing[0], len(differing) - 1
        more = f" (and {others} more)" if others else ""
        raise DataError(
            f"data.path={path} was prepared with {name}={found.get(name)!r}, not {request.get(name)!r}{more}; set "
            "another data.path, or delete that directory"
        )
    return prepared


@contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """A directory beside ``path`` that is gone afterwards unless it was renamed; what killed runs left is removed
    first."""
    prefix = f"{path.name}.tmp-{socket.gethostname()}-"
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{prefix}*"):
        if not _is_running(leftover.name.removeprefix(prefix)):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = path.parent / f"{prefix}{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return int(pid) != os.getpid()


def commit(folder: Path, path: Path) -> None:
    """Give a finished workspace its name; the content of its files is on disk already."""
    fsync(folder)
    try:
        folder.rename(path)
    except OSError as error:
        raise DataError(f"data.path={path} appeared while it was being prepared ({error}); run again") from None
    fsync(path.parent)
