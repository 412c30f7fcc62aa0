"""A file of fixed-size records, read and written at queue depth without the interpreter's lock."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from numba import int32, types

from megamem.errors import TierError
from megamem_kernels.jit import njit

_preadv = types.ExternalFunction("preadv", types.intp(types.int32, types.uintp, types.int32, types.int64))
_pwritev = types.ExternalFunction("pwritev", types.intp(types.int32, types.uintp, types.int32, types.int64))
_VECTORS = 1024  # IOV_MAX
_RUN_BYTES = 1 << 24
_GRAIN = 16


class RecordFile:
    """``records`` records of ``record_bytes`` bytes at their home locations. One process at a time holds a file.

    Raises:
        TierError: from every method, where the file cannot be used as asked.
    """

    def __init__(self, path: Path, record_bytes: int, records: int, *, queue_depth: int) -> None:
        self.path = path
        self.bytes = record_bytes * records
        self._record_bytes = record_bytes
        self._queue_depth = queue_depth
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise failed(path, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Hashed rows have no neighbours worth reading ahead.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        except OSError as error:
            os.close(self._descriptor)
            if isinstance(error, BlockingIOError):
                raise TierError(
                    f"another process uses {path}; stop it, or set another memory.disk.path or name of the run"
                ) from None
            raise failed(path, error) from error

    @property
    def size(self) -> int:
        """Bytes that the file has now."""
        return os.fstat(self._descriptor).st_size

    def clear(self) -> None:
        """Make all records zero, with room reserved for all of them."""
        try:
            os.ftruncate(self._descriptor, 0)
            if self.bytes:
                os.posix_fallocate(self._descriptor, 0, self.bytes)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)  # what was reserved so far is of use to nobody
            raise failed(self.path, error, needed=self.bytes) from error

    def transfer(self, views: Sequence[np.ndarray], slots: np.ndarray, records: np.ndarray, *, write: bool) -> None:
        """Read records into memory, or write them from there.

        Args:
            views: The parts of a record in order, each uint8 ``[slots, bytes]`` in C order; together ``record_bytes`` wide.
            slots: ``[n]`` int64, where in ``views`` each record is.
            records: ``[n]`` int64, distinct.
            write: Direction.

        Raises:
            TierError: the file is shorter than it was made; written to behind its end it would grow again, with zeros for what
                it lost.
        """
        if len(records) and self.size < self.bytes:
            raise truncated(self.path, self.size, self.bytes)
        if len(records) > 1 and not (records[1:] > records[:-1]).all():
            order = np.argsort(records)
            slots, records = slots[order], records[order]
        slots, records = np.ascontiguousarray(slots), np.ascontiguousarray(records)
        parts = min(self._queue_depth, -(-len(records) // _GRAIN))
        edges = [len(records) * part // max(1, parts) for part in range(parts + 1)]
        waiting: list[Future[None]] = [
            _pool(self._queue_depth).submit(self._part, views, slots, records, edges[i], edges[i + 1], write)
            for i in range(1, parts)
        ]
        try:
            if parts:
                self._part(views, slots, records, edges[0], edges[1], write)
        finally:
            failures = [future.exception() for future in waiting]
        for failure in failures:
            if failure is not None:
                raise failure

    def _part(
        self, views: Sequence[np.ndarray], slots: np.ndarray, records: np.ndarray, low: int, high: int, write: bool
    ) -> None:
        bases = np.array([view.ctypes.data for view in views], dtype=np.int64)
        sizes = np.array([view.shape[1] for view in views], dtype=np.int64)
        while low < high:
            low = _transfer(self._descriptor, bases, sizes, slots, records, low, high, write)
            if low < high:
                # Once more, one record and with the system's own word on what is wrong.
                parts = [view[slots[low]] for view in views]
                self._one(parts, int(records[low]), write)
                low += 1

    def _one(self, parts: Sequence[np.ndarray], record: int, write: bool) -> None:
        offset = record * self._record_bytes
        data = b"".join(part.tobytes() for part in parts) if write else b""
        try:
            done = 0
            while done < self._record_bytes:
                if write:
                    done += os.pwrite(self._descriptor, data[done:], offset + done)
                    continue
                piece = os.pread(self._descriptor, self._record_bytes - done, offset + done)
                if not piece:
                    raise truncated(self.path, self.size, self.bytes)
                data += piece
                done += len(piece)
        except OSError as error:
            raise failed(self.path, error) from error
        if not write:
            at = 0
            for part in parts:
                part[:] = np.frombuffer(data, dtype=np.uint8, count=len(part), offset=at)
                at += len(part)

    def synchronize(self) -> None:
        """Hand everything to the disk, and hear about what it refuses."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise failed(self.path, error) from error

    def close(self) -> None:
        """Close the file and let other processes have it."""
        os.close(self._descriptor)


def failed(path: Path, error: OSError, *, needed: int = 0) -> TierError:
    """What to tell a user whose disk refused."""
    if error.errno in (errno.ENOTDIR, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS):
        return TierError(f"{path}: {error.strerror}; set memory.disk.path to a directory that can be written")
    what = f" ({needed / 2**30:.2f} GiB are needed)" if needed else ""
    return TierError(
        f"{path}: {error.strerror or error}{what}; free space there or check the disk, or set memory.disk.path to another "
        "one, then resume from the last checkpoint"
    )


def truncated(path: Path, size: int, needed: int) -> TierError:
    """What to tell a user whose file lost its end."""
    return TierError(
        f"{path} is {size} bytes long in place of {needed}: it was truncated; delete it and resume from the last checkpoint, "
        "which holds its rows"
    )


@lru_cache(maxsize=1)
def _pool(queue_depth: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=queue_depth, thread_name_prefix="megamem-disk")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


@njit(nogil=True, cache=True, error_model="numpy")
def _transfer(
    descriptor: int,
    bases: np.ndarray,
    sizes: np.ndarray,
    slots: np.ndarray,
    records: np.ndarray,
    low: int,
    high: int,
    write: bool,
) -> int:
    """Transfer ascending records ``[low, high)``, neighbours in one call; returns where it stopped, ``high`` if nowhere."""
    fields = len(bases)
    record_bytes = sizes.sum()
    limit = max(1, min(_VECTORS // fields, _RUN_BYTES // record_bytes))
    vectors = np.empty((limit * fields, 2), dtype=np.int64)
    i = low
    while i < high:
        count = 0
        j = i
        while j < high and j - i < limit and records[j] == records[i] + (j - i):
            for field in range(fields):
                vectors[count, 0] = bases[field] + slots[j] * sizes[field]
                vectors[count, 1] = sizes[field]
                count += 1
            j += 1
        offset = records[i] * record_bytes
        if write:
            done = _pwritev(int32(descriptor), vectors.ctypes.data, int32(count), offset)
        else:
            done = _preadv(int32(descriptor), vectors.ctypes.data, int32(count), offset)
        if done != (j - i) * record_bytes:
            return i
        i = j
    return high
