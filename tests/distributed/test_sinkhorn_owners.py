"""Sinkhorn balancing over several owners gives the bits that one owner computes, also where one has no rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megamem.memory.optimizers import sinkhorn_scales
from megamem.testing.distributed import run_distributed

CUTS = ((0, 700, 1000), (0, 0, 1000), (0, 1000, 1000))


def matrix() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1000, 9, generator=generator) * torch.logspace(-5, 2, 1000)[:, None]


def scales_of_parts() -> list[tuple[Tensor, Tensor]]:
    rank, results = dist.get_rank(), []
    for cut in CUTS:
        part = matrix()[cut[rank] : cut[rank + 1]]
        results.append(sinkhorn_scales(part, iterations=11, group=dist.group.WORLD))
    return results


def test_owners_change_no_bit() -> None:
    rows, columns = sinkhorn_scales(matrix(), iterations=11, group=None)
    assert not rows[0] and rows[-1]
    for cut, *parts in zip(CUTS, *run_distributed(scales_of_parts, 2), strict=True):
        for rank, (part, same) in enumerate(parts):
            assert torch.equal(part, rows[cut[rank] : cut[rank + 1]])
            assert torch.equal(same, columns)
