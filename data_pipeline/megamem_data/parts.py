"""The same preparation by many machines: the tokenizer once, portions of the sources side by side, and all of it merged.

``PATH.parts`` holds what there is so far: ``tokenizer/`` and ``part-00001-of-00016/``, each with ``part.json``. Portions are cut
between files of the sources, so that a machine reads only its own; merged in order they are the documents in their order, and
the result is the one that a single machine writes: every file byte for byte, but for ``data.json`` and ``clusters.safetensors``,
whose header lists its metadata in any order; the tree in it has the same fingerprint.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamem.errors import DataError
from megamem.files import TOKENIZER_FILES, fsync
from megamem_data.prepare import Job, written
from megamem_data.prepared import PreparedData, check_file, describe_file
from megamem_data.shards import Shard, ShardInfo, ShardWriter, token_dtype
from megamem_data.sources import SourceCounts, portions
from megamem_data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

_RECORD = "part.json"
_PART = re.compile(r"part-\d{5,}-of-(\d{5,})")


def parts_folder(path: Path) -> Path:
    """Where the parts of the prepared data ``path`` are kept until they are merged."""
    return path.with_name(path.name + ".parts")


@dataclass(frozen=True, slots=True)
class _Record:
    """``part.json``."""

    request: dict[str, Any]
    tokenizer: str
    """Fingerprint of the tokenizer."""
    counts: dict[str, int]
    shards: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]


def prepare_tokenizer(job: Job) -> None:
    """Train the tokenizer of a request for the portions to use; one that exists already they take from where it is."""
    if job.config.tokenizer.model:
        job.report.line(f"data: the tokenizer is {job.config.tokenizer.model}; nothing to do")
        return
    folder = parts_folder(job.path) / "tokenizer"
    if job.existing() is not None or _read(folder, job) is not None:
        return
    with written(folder) as temporary:
        tokenizer = job.make_tokenizer(temporary)
        _write(temporary, job, tokenizer, SourceCounts(), [])


def prepare_part(job: Job, number: int, count: int) -> None:
    """Encode portion ``number``, counted from 1, of ``count``; a finished one is used again.

    Raises:
        DataError: the tokenizer is not there yet, or what is there belongs to another request or tokenizer.
    """
    folder = _part_folder(job.path, number, count)
    if job.existing() is not None:
        return
    tokenizer = _tokenizer(job)
    if _finished(folder, job, tokenizer) is not None:
        job.report.line(f"data: {folder} is there already; nothing to do")
        return
    with written(folder) as temporary:
        infos, counts = job.encode(temporary, tokenizer, portions(job.config.sources, number - 1, count))
        _write(temporary, job, tokenizer, counts, infos)


def merge_parts(job: Job) -> PreparedData:
    """Put all parts together, cluster the documents, give the result its name, and delete the parts.

    Raises:
        DataError: a part is missing, damaged, or of another request or tokenizer.
    """
    if (existing := job.existing()) is not None:
        return existing
    root = parts_folder(job.path)
    tokenizer = _tokenizer(job)
    folders = _all_parts(job.path)
    counts = SourceCounts()
    with written(job.path) as temporary:
        for name, content in tokenizer.files.items():
            (temporary / name).write_bytes(content)
        writer = ShardWriter(temporary, dtype=token_dtype(tokenizer.vocab_size), shard_tokens=job.config.shard_tokens)
        with job.report.stage("data: merging parts", len(folders), "parts") as advance:
            for folder in folders:
                record = _part(folder, job, tokenizer)
                for name, value in record.counts.items():
                    setattr(counts, name, getattr(counts, name) + value)
                for info in record.shards:
                    shard = Shard(folder, ShardInfo(**info), token_dtype(tokenizer.vocab_size))
                    writer.add(shard.tokens, shard.lengths)
                advance(1)
        manifest = job.finish(temporary, tokenizer, writer.close(), counts)
    for folder in (*folders, root / "tokenizer", *root.glob("*.tmp-*")):  # the last: what killed jobs left
        shutil.rmtree(folder, ignore_errors=True)
    if not any(root.iterdir()):
        root.rmdir()
    return job.opened(manifest)


def _part_folder(path: Path, number: int, count: int) -> Path:
    return parts_folder(path) / f"part-{number:05d}-of-{count:05d}"


def _all_parts(path: Path) -> list[Path]:
    found = {folder: match for folder in parts_folder(path).glob("part-*") if (match := _PART.fullmatch(folder.name))}
    if not found:
        raise DataError(
            f"{parts_folder(path)} holds no parts; run `megamem data prepare CONFIG --shard 1/N` to N/N first"
        )
    counts = sorted({int(match[1]) for match in found.values()})
    if len(counts) > 1:
        raise DataError(
            f"{parts_folder(path)} holds parts of {counts[0]} and of {counts[1]}; delete those of one number"
        )
    folders = [_part_folder(path, number, counts[0]) for number in range(1, counts[0] + 1)]
    for number, folder in enumerate(folders, start=1):
        if folder not in found:
            raise DataError(
                f"{folder} is missing; run `megamem data prepare CONFIG --shard {number}/{counts[0]}` first"
            )
    return folders


def _part(folder: Path, job: Job, tokenizer: Tokenizer) -> _Record:
    """The record of a finished part, whose files are what was written."""
    record = _finished(folder, job, tokenizer)
    if record is None:
        raise DataError(f"{folder} has no {_RECORD}; delete it and prepare that part again")
    for name, expected in record.files.items():
        check_file(folder / name, expected, hashed=True)
    return record


def _finished(folder: Path, job: Job, tokenizer: Tokenizer) -> _Record | None:
    """The record of a part, None where there is none; DataError where it is of another request or tokenizer."""
    record = _read(folder, job)
    if record is not None and record.tokenizer != tokenizer.fingerprint:
        raise DataError(f"{folder} was made with another tokenizer; delete it and prepare that part again")
    return record


def _tokenizer(job: Job) -> Tokenizer:
    if job.config.tokenizer.model:
        return open_tokenizer(job.config.tokenizer.model)
    folder = parts_folder(job.path) / "tokenizer"
    record = _read(folder, job)
    if record is None:
        raise DataError(f"{folder} is not there; run `megamem data tokenizer CONFIG` first")
    for name, expected in record.files.items():
        check_file(folder / name, expected, hashed=True)
    names = [name for name in TOKENIZER_FILES if name in record.files]
    return load_tokenizer({name: (folder / name).read_bytes() for name in names}, str(folder))


def _write(folder: Path, job: Job, tokenizer: Tokenizer, counts: SourceCounts, infos: list[ShardInfo]) -> None:
    record = _Record(
        request=job.request,
        tokenizer=tokenizer.fingerprint,
        counts=asdict(counts),
        shards=[asdict(info) for info in infos],
        files={file.name: describe_file(file) for file in sorted(folder.iterdir())},
    )
    path = folder / _RECORD
    path.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    fsync(path)


def _read(folder: Path, job: Job) -> _Record | None:
    """The record of a part, None where there is none; DataError where it answers another request."""
    path = folder / _RECORD
    try:
        record = _Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete its folder and prepare it again") from None
    differing = [
        name
        for name in sorted(job.request.keys() | record.request.keys())
        if job.request.get(name) != record.request.get(name)
    ]
    if differing:
        name = differing[0]
        raise DataError(
            f"{folder} was made with {name}={record.request.get(name)!r}, not {job.request.get(name)!r}; delete "
            f"{folder.parent}, or set another data.path"
        )
    return record
