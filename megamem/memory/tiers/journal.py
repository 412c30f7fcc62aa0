"""The undo journal of a record file: what records held at the last commit, written down before they are overwritten."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megamem.memory.tiers.records import failed

_HEADER = struct.Struct("<8sQQI4x")
_MAGIC = b"mmundo01"


class UndoJournal:
    """Batches of old records, each with a checksum and the *epoch*: the number of the commit that they belong to.

    Raises:
        TierError: from every method, where the file cannot be used as asked.
    """

    def __init__(self, path: Path, record_bytes: int) -> None:
        self.path = path
        self._record_bytes = record_bytes
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise failed(path, error) from error

    def append(self, epoch: int, records: np.ndarray, content: np.ndarray) -> None:
        """Write down ``content`` uint8 ``[n, record_bytes]`` of ``records`` int64 ``[n]``. It is there when this returns."""
        body = records.astype("<i8").tobytes() + content.tobytes()
        rest = memoryview(_HEADER.pack(_MAGIC, epoch, len(records), zlib.crc32(body)) + body)
        end = self.size
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            os.ftruncate(self._descriptor, end)  # nothing may follow a broken batch
            raise failed(self.path, error) from error

    def batches(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``(records, content)`` of each whole batch of ``epoch``. What follows the first broken one was never acted on."""
        at = 0
        try:
            while True:
                header = os.pread(self._descriptor, _HEADER.size, at)
                if len(header) < _HEADER.size:
                    return
                magic, found, count, checksum = _HEADER.unpack(header)
                size = count * (8 + self._record_bytes)
                if magic != _MAGIC or found != epoch or at + size > os.fstat(self._descriptor).st_size:
                    return
                body = self._read(size, at + _HEADER.size)
                if zlib.crc32(body) != checksum:
                    return
                records = np.frombuffer(body, dtype="<i8", count=count)
                content = np.frombuffer(body, dtype=np.uint8, offset=8 * count)
                yield records.astype(np.int64), content.reshape(count, self._record_bytes)
                at += _HEADER.size + size
        except OSError as error:
            raise failed(self.path, error) from error

    def clear(self) -> None:
        """Forget everything."""
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            raise failed(self.path, error) from error

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _read(self, size: int, offset: int) -> bytes:
        body = bytearray()
        while len(body) < size:
            piece = os.pread(self._descriptor, size - len(body), offset + len(body))
            if not piece:
                break
            body += piece
        return bytes(body)
