"""Sums of the row gradients of one step, beside what torch has for them."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from harness import Case, Contender, Options
from row_gather import huge, row_ids
from torch import Tensor

from megamem_kernels.segment_sum import segment_sum

INDEX_ADD = "zero_ and index_add_"
COALESCE = "torch.sparse coalesce"


def _case(name: str, values: Tensor, ids: Tensor, rows: int) -> Case:
    distinct, segment = torch.unique(ids, return_inverse=True)
    count, width = values.shape
    out = huge(torch.float32, len(distinct), width)

    def coalesce() -> Tensor:
        return torch.sparse_coo_tensor(ids[None], values, (rows, width), check_invariants=False).coalesce()

    return Case(
        f"sums of {count:,} rows of {width} {str(values.dtype).removeprefix('torch.')}, {name}, {len(distinct):,} segments",
        [
            Contender("segment_sum", partial(segment_sum, values, segment, len(distinct), out=out)),
            Contender(INDEX_ADD, lambda: out.zero_().index_add_(0, segment, values.float())),
            Contender(COALESCE, coalesce, "sorts too"),
        ],
        unit_bytes=values.nbytes + out.nbytes,
        bars={INDEX_ADD: 1.0, COALESCE: 1.0},
    )


def cases(options: Options) -> list[Case]:
    """Lookups of one step, in tables whose rows are narrow as an Engram head's and wide."""
    generator = np.random.default_rng(options.seed)
    rows, count = (3000, 640) if options.quick else (5_000_000, 200_000)
    result = []
    for width, dtype in ((32, torch.float32), (128, torch.float32), (128, torch.bfloat16)):
        for name in ("Zipf(1.05)", "uniform"):
            values = huge(dtype, count, width).normal_()
            result.append(_case(name, values, row_ids(name, rows, count, generator), rows))
    return result
