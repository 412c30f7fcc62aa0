"""Documents of ``data.sources``, in an order that depends on the sources alone."""

from __future__ import annotations

import glob
import gzip
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

from megamem.errors import DataError
from megamem_data.config import SourceConfig


@dataclass(slots=True)
class SourceCounts:
    """What reading the sources met on the way."""

    documents: int = 0
    """Documents with text."""
    empty: int = 0
    """Documents without any character but white space; left out."""
    invalid_utf8: int = 0
    """Documents whose undecodable bytes became U+FFFD."""
    binary: int = 0
    """Files that hold NUL bytes, taken for binary; left out."""


Portion = tuple[int, Sequence[Path] | None]
"""Number of a source, and those of its files that are meant; None for the whole source."""


def read_documents(
    sources: Sequence[SourceConfig], *, strict: bool, counts: SourceCounts, chosen: Sequence[Portion] | None = None
) -> Iterator[str]:
    """The texts of all sources, one per document; ``counts`` is updated on the way. With ``chosen`` only of these portions.

    Raises DataError for a source that is missing, unreadable or malformed; with ``strict`` also for invalid UTF-8 and
    binary files, naming the file.
    """
    for number, files in [(number, None) for number in range(len(sources))] if chosen is None else chosen:
        source, where = sources[number], f"data.sources[{number}]"
        if source.kind == "datasets":
            documents = _datasets_texts(source, where)
        else:
            documents = _file_texts(
                source, list_files(source, where) if files is None else files, where, strict, counts
            )
        texts = (text for text in documents if _has_text(text, counts))
        yield from islice(texts, source.max_documents or None)


def portions(sources: Sequence[SourceConfig], number: int, count: int) -> list[Portion]:
    """Portion ``number`` of ``count`` of all sources. One after another they are all documents in their order.

    They are cut between files, into shares of about equally many bytes. A source with ``max_documents`` and one of kind
    ``datasets`` cannot be cut, and is in one portion whole.
    """
    pieces: list[tuple[int, Path | None]] = []
    sizes: list[int] = []
    for index, source in enumerate(sources):
        whole = source.kind == "datasets" or source.max_documents > 0
        files = [] if source.kind == "datasets" else list_files(source, f"data.sources[{index}]")
        pieces += [(index, None)] if whole else [(index, file) for file in files]
        sizes += [sum(file.stat().st_size for file in files)] if whole else [file.stat().st_size for file in files]
    total, before = max(1, sum(sizes)), 0
    mine: list[tuple[int, Path | None]] = []
    for piece, size in zip(pieces, sizes, strict=True):
        if min(count - 1, (before + size // 2) * count // total) == number:
            mine.append(piece)
        before += size
    return [
        (index, [file for _, file in group if file is not None] or None)
        for index, group in groupby(mine, key=itemgetter(0))
    ]


def list_files(source: SourceConfig, where: str = "data.sources") -> list[Path]:
    """Files of a source that reads files, sorted; DataError where there is none. Hidden files and folders are left
    out."""
    if source.kind == "python_stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        # Its tests are two thirds of it, and much alike.
        outside = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        return sorted(path for path in root.rglob("*.py") if outside.isdisjoint(path.relative_to(root).parts))
    root = Path(source.path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        patterns = [source.pattern] if source.kind == "folder" else ["*.jsonl", "*.jsonl.gz"]
        try:
            found = {path for pattern in patterns for path in root.glob(pattern) if _visible(path, root)}
        except (ValueError, NotImplementedError) as error:
            raise DataError(
                f"{where}: pattern is {source.pattern!r}; set one relative to {root}, such as **/*.md ({error})"
            ) from None
        described = f"{' or '.join(patterns)} in {root}"
    else:
        found = {Path(name) for name in glob.glob(str(root), recursive=True)}
        described = str(root)
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise DataError(f"{where}: no file matches {described}; set path to an existing folder, file or glob")
    return files


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _has_text(text: str, counts: SourceCounts) -> bool:
    if text.strip():
        counts.documents += 1
        return True
    counts.empty += 1
    return False


def _file_texts(
    source: SourceConfig, files: Sequence[Path], where: str, strict: bool, counts: SourceCounts
) -> Iterator[str]:
    for path in files:
        try:
            if source.kind == "jsonl":
                with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as lines:
                    for number, line in enumerate(lines, start=1):
                        if line.strip():
                            text = _decode(line, f"line {number} of {path}", strict, counts)
                            text = _field(text, source.text_field, f"line {number} of {path}")
                            # JSON may escape half a surrogate pair, which no UTF-8 tokenizer takes
                            data = text.encode("utf-8", errors="surrogatepass")
                            yield _decode(data, f"line {number} of {path}", strict, counts)
            else:
                data = path.read_bytes()
                if b"\0" not in data:
                    yield _decode(data, str(path), strict, counts)
                elif strict:
                    raise DataError(f"{path} holds NUL bytes and is no text; exclude it with the source's pattern")
                else:
                    counts.binary += 1
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} of {where} cannot be read: {error}") from error


def _decode(data: bytes, origin: str, strict: bool, counts: SourceCounts) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if strict:
            raise DataError(
                f"{origin} is not valid UTF-8 (byte {error.start}); convert it, or prepare without strict to "
                "replace the bytes"
            ) from None
        counts.invalid_utf8 += 1
        return data.decode("utf-8", errors="replace")


def _field(line: str, field: str, origin: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is not JSON ({error}); repair or remove it") from None
    if not isinstance(record, dict):
        raise DataError(f"{origin} is no JSON object; write one object with the key {field!r} per line")
    return _text(record, field, origin)


def _text(record: dict[str, Any], field: str, origin: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        keys = ", ".join(sorted(key for key, value in record.items() if isinstance(value, str))) or "none"
        raise DataError(f"{origin} has no text under {field!r}; set text_field to one of its text keys: {keys}")
    return text


def _datasets_texts(source: SourceConfig, where: str) -> Iterator[str]:
    import datasets

    options: dict[str, Any] = dict(source.options)
    try:
        rows = datasets.load_dataset(source.path, split=source.split, streaming=True, **options)
        for number, row in enumerate(rows):
            yield _text(row, source.text_field, f"row {number} of {source.path}")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{where}: datasets.load_dataset({source.path!r}, split={source.split!r}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error
