"""The memory of every rank of a run, added up before the first step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megamem.models.attention import choose_backend
from megamem.observe.accounting import Work, account, largest, render, totals
from megamem_checkpoints.owned import index_bytes
from megamem_launch.compose import Parts, precision_of


def account_memory(parts: Parts) -> dict[str, int]:
    """Bytes of this rank by part and place, see :mod:`megamem.observe.accounting`."""
    config, layout = parts.config, parts.groups.layout
    train = config.train
    dtype = torch.bfloat16 if precision_of(config) == "bf16" else torch.float32
    work = Work(
        seq_length=config.data.seq_length,
        micro_batch_size=train.micro_batch_size,
        micro_batches=train.global_batch_size // (train.micro_batch_size * layout.dp),
        element_bytes=dtype.itemsize,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=train.recompute,
        device=parts.groups.device.type,
        attention=choose_backend(config.model, parts.groups.device, dtype),
    )
    held = account(
        work,
        model=config.model,
        memory=config.memory,
        layout=layout,
        stage=parts.groups.coordinates.pp,
        dense=parts.zero.memory(),
        tables=parts.memory.tables.values(),
    )
    for table in parts.memory.tables.values():
        saving = index_bytes(table.stop - table.start, config.checkpoint.incremental)
        held["buffers_host"] = held.get("buffers_host", 0) + saving
    return held


def report_memory(parts: Parts) -> dict[str, Any]:
    """Print the account on rank 0; what the journal keeps of it. Collective over the world."""
    own = account_memory(parts)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    most, most_total = largest(ranks), largest([totals(rank) for rank in ranks])
    if parts.groups.coordinates.rank == 0:
        Console().print(render(own, most, most_total=most_total))
    return {"rank": own, "largest": most, "largest_total": most_total}
