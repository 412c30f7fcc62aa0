"""How rows get from a host table to a CUDA device: gathered by the CPU and copied, or read by a kernel through the bus."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.memory.table import OwnedTable
from megamem_kernels.row_gather import dequantize_rows, gather_rows

_ROWS = 1 << 14
_ROUNDS = 3


def reads_through_bus(memory: MemoryConfig, tables: Sequence[OwnedTable], device: torch.device) -> bool:
    """What ``memory.host_gather`` means for these tables; ``auto`` measures both ways on the largest host table.

    Raises:
        ConfigError: ``uva`` without a CUDA device.
    """
    if device.type != "cuda":
        if memory.host_gather == "uva":
            raise ConfigError("memory.host_gather is uva, which needs a CUDA device; set auto or cpu")
        return False
    held = [table for table in tables if table.storage.tier == "host" and table.rows.records]
    if memory.host_gather != "auto" or not held:
        return memory.host_gather == "uva"
    table = max(held, key=lambda table: table.rows.records * table.spec.width)
    index = np.random.default_rng(0).integers(0, table.rows.records, _ROWS)
    out = torch.empty(_ROWS, table.spec.width, device=device)
    fields = {
        field.name: torch.empty(_ROWS, *field.shape, dtype=field.dtype, pin_memory=True) for field in table.rows.fields
    }

    def copied() -> None:
        table.gather(index, fields)
        dequantize_rows({name: rows.to(device, non_blocking=True) for name, rows in fields.items()}, out)

    def read() -> None:
        gather_rows(table.rows.arrays, torch.from_numpy(index).to(device), out)

    return _seconds(read) < _seconds(copied)


def _seconds(run: Callable[[], None]) -> float:
    """The least time of a run; the first one does not count."""
    least = float("inf")
    for number in range(_ROUNDS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if number:
            least = min(least, time.perf_counter() - began)
    return least
