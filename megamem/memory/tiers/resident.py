"""The tiers that hold every record in memory: ``device`` and ``host``."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megamem.errors import TierError
from megamem.memory.tiers.base import record_bytes
from megamem.memory.tiers.limits import available_host_bytes
from megamem_kernels.formats import Field
from megamem_kernels.parallel import for_ranges
from megamem_kernels.row_gather import copy_rows

_SHARED = "/dev/shm"
_PAGES_PER_THREAD = 4096
_REGISTER_MAPPED = 2


class ResidentStore:
    """A :class:`~megamem.memory.tiers.base.RowStore` whose slots are its records."""

    def __init__(
        self, fields: tuple[Field, ...], records: int, arrays: dict[str, Tensor], release: Callable[[], None]
    ) -> None:
        """``arrays``: zeros, per field ``[records, *shape]``; ``release`` is called once, before they are let go."""
        self.fields, self.records, self.arrays = fields, records, arrays
        self.capacity = max(1, records)
        self._release: Callable[[], None] | None = release

    def locate(self, records: np.ndarray, *, write: bool) -> np.ndarray:
        """The records themselves."""
        return records

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        return {name: array[start:stop].to("cpu", copy=True) for name, array in self.arrays.items()}

    def pick(self, records: np.ndarray) -> dict[str, Tensor]:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        index = torch.from_numpy(records)
        return {
            name: copy_rows(array, index.to(array.device), array.new_empty(len(index), *array.shape[1:])).cpu()
            for name, array in self.arrays.items()
        }

    def write(self, start: int, values: Mapping[str, Tensor]) -> None:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        for name, value in values.items():
            self.arrays[name][start : start + len(value)].copy_(value)

    def commit(self, label: str) -> None:
        """Nothing: memory does not outlive its process."""

    @property
    def committed(self) -> str:
        """Empty: memory does not outlive its process."""
        return ""

    def resident_bytes(self) -> dict[str, int]:
        """See :class:`~megamem.memory.tiers.base.RowStore`."""
        kinds: dict[str, int] = {}
        for array in self.arrays.values():
            kind = "host" if array.device.type == "cpu" else "device"
            kinds[kind] = kinds.get(kind, 0) + array.nbytes
        return kinds

    def close(self) -> None:
        """Release the memory as soon as no tensor over it is left."""
        if self._release is not None:
            self._release()
            self._release = None
        self.arrays = {}


def open_device(name: str, fields: tuple[Field, ...], records: int, device: torch.device) -> ResidentStore:
    """Zeros in the memory of the accelerator, which on a machine without one is ordinary host memory.

    Raises:
        TierError: the accelerator has not enough free memory.
    """
    try:
        arrays = {field.name: torch.zeros(records, *field.shape, dtype=field.dtype, device=device) for field in fields}
    except torch.OutOfMemoryError as error:
        raise TierError(
            f"{name} needs {_gib(records * record_bytes(fields))} of device memory, which is not free; set tier or "
            "state_tier of memory.storage to host or disk, or use more ranks"
        ) from error
    return ResidentStore(fields, records, arrays, lambda: None)


def open_host(
    name: str, fields: tuple[Field, ...], records: int, *, kind: Literal["private", "shared"], pin: bool
) -> ResidentStore:
    """Zeros in host memory that is returned to the system however the process ends.

    Pages are huge where the system grants them. The threads of the CPU kernels touch them first, so that on a NUMA machine
    they lie with these threads, and so that a lack of memory shows here and not in the middle of a run.

    Args:
        name: For errors.
        fields: Of a record.
        records: Their number.
        kind: ``private``: anonymous memory. ``shared``: a file in ``/dev/shm`` whose name is gone before it is used.
        pin: Register it with CUDA, for copies and kernels that read it over the bus.

    Raises:
        TierError: there is not enough memory, or CUDA refuses to register it.
    """
    needed = records * record_bytes(fields)
    rooms = [("this machine", available_host_bytes())]
    if kind == "shared":
        try:
            file_system = os.statvfs(_SHARED)
        except OSError as error:
            raise _no_room(name, needed, f"{_SHARED} cannot be used ({error.strerror})") from error
        rooms.append((_SHARED, file_system.f_bavail * file_system.f_frsize))
    for where, available in rooms:
        if needed > available:
            raise _no_room(name, needed, f"{_gib(available)} are free in {where}")
    arrays = {}
    for field in fields:
        try:
            arrays[field.name] = _map(field, records, kind)
        except OSError as error:
            where = _SHARED if kind == "shared" else "this machine"
            raise _no_room(name, needed, f"{where} refuses ({error.strerror})") from error
    return ResidentStore(fields, records, arrays, _register(name, arrays) if pin else lambda: None)


def _map(field: Field, records: int, kind: Literal["private", "shared"]) -> Tensor:
    size = records * field.nbytes
    if not size:
        return field.allocate(records)
    if kind == "shared":
        descriptor = os.open(_SHARED, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
        try:
            _for_pages(size, lambda low, high: os.posix_fallocate(descriptor, low, high - low))
            memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    if kind == "private":
        pages = raw.numpy()[:: mmap.PAGESIZE]
        for_ranges(lambda low, high: pages[low:high].fill(0), len(pages), grain=_PAGES_PER_THREAD)
    return raw.view(field.dtype).view(records, *field.shape)


def _for_pages(size: int, function: Callable[[int, int], None]) -> None:
    pages = -(-size // mmap.PAGESIZE)
    for_ranges(
        lambda low, high: function(low * mmap.PAGESIZE, min(high * mmap.PAGESIZE, size)),
        pages,
        grain=_PAGES_PER_THREAD,
    )


def _register(name: str, arrays: Mapping[str, Tensor]) -> Callable[[], None]:
    """Pin the arrays for CUDA; returns what undoes it."""
    runtime = torch.cuda.cudart()
    pointers: list[int] = []

    def release() -> None:
        torch.cuda.synchronize()
        for pointer in pointers:
            runtime.cudaHostUnregister(pointer)

    for array in arrays.values():
        if not array.nbytes:
            continue
        code = int(runtime.cudaHostRegister(array.data_ptr(), array.nbytes, _REGISTER_MAPPED))
        if code:
            release()
            raise TierError(
                f"CUDA refuses to register {_gib(array.nbytes)} of host memory for {name} (error {code}); raise the limit "
                "of locked memory (ulimit -l unlimited) or set memory.storage.tier to device or disk"
            )
        pointers.append(array.data_ptr())
    return release


def _no_room(name: str, needed: int, why: str) -> TierError:
    return TierError(
        f"{name} needs {_gib(needed)} of host memory and {why}; set tier or state_tier of memory.storage to disk, "
        "memory.storage.format to bf16 or fp8, or use more ranks"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
