"""Gather of table rows by index beside what torch has for it, and beside a plain copy of as many bytes."""

from __future__ import annotations

import mmap
from functools import partial

import numpy as np
import torch
from harness import Case, Contender, Options
from torch import Tensor

from megamem_kernels.formats import FormatName, row_fields
from megamem_kernels.rounding import quantize_rows
from megamem_kernels.row_gather import copy_rows, gather_rows

COPY = "memory copy of the payload"
INDEX_SELECT = "torch.index_select(out=)"
EMBEDDING = "F.embedding"
"""Least share of the bandwidth of a memory copy, by bytes of a row."""
COPY_BARS = {256: 0.7, 160: 0.45}


def huge(dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory as the host tier takes it: anonymous, of huge pages where the system grants them; zeros."""
    size = max(1, torch.Size(shape).numel() * dtype.itemsize)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared, the default, gets small pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel()).view(shape)


def row_ids(name: str, rows: int, count: int, generator: np.random.Generator) -> Tensor:
    """``count`` ids below ``rows``: ``uniform``, or ``Zipf(1.05)`` with the busy rows scattered over the table."""
    if name == "uniform":
        return torch.from_numpy(generator.integers(0, rows, count))
    weights = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -1.05)
    ranks = np.searchsorted(weights, generator.random(count) * weights[-1]).clip(max=rows - 1)
    return torch.from_numpy(generator.permutation(rows)[ranks])


def _copy_case(name: str, table: Tensor, ids: Tensor, payload: Tensor, origin: Tensor) -> Case:
    count, width = len(ids), table.shape[1]
    out, source = payload[: count * width].view(count, width), origin[: count * width].view(count, width)
    row_bytes = width * table.element_size()
    ours, limit = partial(copy_rows, table, ids, out), partial(out.copy_, source)
    return Case(
        f"gather of {count:,} rows of {row_bytes} bytes from {len(table):,}, {name}",
        [
            Contender("copy_rows", ours),
            Contender(INDEX_SELECT, partial(torch.index_select, table, 0, ids, out=out)),
            Contender(EMBEDDING, partial(torch.nn.functional.embedding, ids, table), "allocates its result"),
            Contender(COPY, limit, "the physical limit"),
        ],
        unit_bytes=out.nbytes,
        bars={INDEX_SELECT: 1.0, EMBEDDING: 1.0, COPY: COPY_BARS[row_bytes]},
    )


def _decode_case(stored: FormatName, table: Tensor, ids: Tensor) -> Case:
    width = 128
    fields = {field.name: huge(field.dtype, len(table), *field.shape) for field in row_fields(stored, width)}
    for low in range(0, len(table), 1 << 16):
        part = {name: tensor[low : low + (1 << 16)] for name, tensor in fields.items()}
        quantize_rows(table[low : low + (1 << 16)].float(), part)
    out = huge(torch.float32, len(ids), width)

    def peer() -> Tensor:
        values = fields["rows"].view(torch.uint8).index_select(0, ids).view(fields["rows"].dtype).float()
        scales = torch.exp2(fields["scales"].index_select(0, ids).float() - 127)
        return torch.mul(values.view(len(ids), -1, 32), scales[..., None], out=out.view(len(ids), -1, 32))

    def peer_bf16() -> Tensor:
        return out.copy_(fields["rows"].index_select(0, ids))

    return Case(
        f"gather of {len(ids):,} {stored} rows of {width} values, decoded to fp32, uniform",
        [
            Contender("gather_rows", partial(gather_rows, fields, ids, out)),
            Contender("torch", peer if stored == "fp8" else peer_bf16),
        ],
        unit_bytes=out.nbytes,
        bars={"torch": 1.0},
    )


def cases(options: Options) -> list[Case]:
    """Results are 256 MB, far beyond any cache, in memory that is used again in each round, as are both sides of the copy."""
    generator = np.random.default_rng(options.seed)
    rows, payload_bytes = (3000, 1 << 16) if options.quick else (6_000_000, 256_000_000)
    table = huge(torch.bfloat16, rows, 128)
    for low in range(0, rows, 1 << 16):
        table[low : low + (1 << 16)].normal_()
    payload, origin = (huge(torch.bfloat16, payload_bytes // 2).fill_(value) for value in (0, 1))
    result = []
    for width in (128, 80):
        narrow = table.view(-1)[: rows * width].view(rows, width)
        for name in ("uniform", "Zipf(1.05)"):
            ids = row_ids(name, rows, payload_bytes // (2 * width), generator)
            result.append(_copy_case(name, narrow, ids, payload, origin))
    few = table[: max(1, rows // 6)]
    ids = row_ids("uniform", len(few), payload_bytes // 1024, generator)
    formats: tuple[FormatName, ...] = ("bf16", "fp8")
    return result + [_decode_case(stored, few, ids) for stored in formats]
