"""Of real ranks that wait for each other, the one that computes longer is named, and not those that wait for it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from megamem.observe.heartbeat import Heartbeat
from megamem.observe.phases import Phases
from megamem.testing.distributed import run_distributed
from megamem_launch.watch.stragglers import STEPS, straggler_report


def train(folder: str) -> None:
    rank = dist.get_rank()
    marks = Phases()
    heart = Heartbeat(Path(folder) / f"rank-{rank:05d}.json", rank, marks, seconds=0.02)
    for step in range(40):
        marks.step = step + 1
        with marks("forward"):
            time.sleep(0.06 if rank == 1 else 0.02)
        with marks("dense_reduce"):
            dist.all_reduce(torch.ones(4))
        marks.take()
        dist.barrier()
    heart.close()


def test_slow_rank_is_named(tmp_path: Path) -> None:
    run_distributed(train, 3, str(tmp_path), timeout=120.0)
    found = straggler_report(tmp_path)
    assert found["slow_ranks"] == [1] and found["steps"] >= STEPS
    assert 1.2 < found["ranks"][1]["ratio"] < 6
    assert found["text"].startswith("slower than the median of their stage: rank 1 (")
