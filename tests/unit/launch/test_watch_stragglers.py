from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamem_launch.watch.stragglers import STEPS, straggler_report


def write(live: Path, rank: int, busy: float, *, host: str, steps: int = 30, waiting: float = 0.0) -> None:
    """``busy`` seconds per step of computation, ``waiting`` for others."""
    seconds = {"forward": busy * steps * 0.25, "backward": busy * steps * 0.75, "dense_reduce": waiting * steps}
    record = {
        "beat": 3,
        "rank": rank,
        "host": host,
        "pid": 1,
        "start_tick": 1,
        "time": 0.0,
        "step": 5 + steps,
        "first_step": 5,
        "phase": "forward",
        "sequence": 1,
        "idle_seconds": 0.0,
        "seconds": seconds,
        "end": 3,
    }
    (live / f"rank-{rank:05d}.json").write_text(json.dumps(record))


def test_a_rank_that_computes_longer_is_slow_and_those_that_wait_for_it_are_not(tmp_path):
    for rank in range(4):
        write(tmp_path, rank, 0.3 if rank == 2 else 0.1, host=f"node{rank // 2}", waiting=0.0 if rank == 2 else 0.2)
    found = straggler_report(tmp_path)
    assert found["slow_ranks"] == [2] and found["steps"] == 30
    assert [rank["ratio"] for rank in found["ranks"]] == [1.0, 1.0, 3.0, 1.0]
    assert found["slow_nodes"] == []  # its other rank is well
    assert found["text"] == "slower than the median of their stage: rank 2 (node1) 3.00x"
    assert found["ranks"][0]["busy_seconds"] == pytest.approx(0.1)


def test_a_node_is_slow_when_all_its_ranks_are(tmp_path):
    for rank in range(6):
        write(tmp_path, rank, 0.15 if rank in (2, 3) else 0.1, host=f"node{rank // 2}", steps=30 + rank)
    found = straggler_report(tmp_path)
    assert found["slow_ranks"] == [2, 3] and found["slow_nodes"] == ["node1"]
    assert found["nodes"] == {"node0": 1.0, "node1": 1.5, "node2": 1.0}


def test_of_two_ranks_the_slower_one_is_named(tmp_path):
    write(tmp_path, 0, 0.2, host="a")
    write(tmp_path, 1, 0.1, host="a")
    assert straggler_report(tmp_path)["slow_ranks"] == [0]


def test_stages_of_a_pipeline_are_not_compared(tmp_path):
    for rank in range(4):
        write(tmp_path, rank, 0.1 if rank < 2 else 0.5, host="a")
    assert straggler_report(tmp_path, stages=2)["slow_ranks"] == []
    assert straggler_report(tmp_path)["slow_ranks"] == [2, 3]


def test_a_few_steps_are_noise(tmp_path):
    for rank in range(4):
        write(tmp_path, rank, 0.3 if rank == 2 else 0.1, host=f"node{rank}", steps=STEPS - (rank == 0))
    found = straggler_report(tmp_path)
    assert found["ranks"][2]["ratio"] == 3.0 and found["slow_ranks"] == found["slow_nodes"] == [] and not found["text"]
    write(tmp_path, 0, 0.1, host="node0", steps=STEPS)
    assert straggler_report(tmp_path)["slow_ranks"] == [2]


def test_stages_are_those_of_the_world_though_ranks_are_silent(tmp_path):
    for rank in range(3):  # of four
        write(tmp_path, rank, 0.1 if rank < 2 else 0.5, host="a")
    assert straggler_report(tmp_path, stages=2, world_size=4)["slow_ranks"] == []


def test_ranks_without_a_measured_step_are_left_out(tmp_path):
    write(tmp_path, 0, 0.0, host="a", steps=0)
    found = straggler_report(tmp_path)
    assert found == {"steps": 0, "ranks": [], "nodes": {}, "slow_ranks": [], "slow_nodes": [], "text": ""}
    assert straggler_report(tmp_path / "absent") == found
    write(tmp_path, 1, 0.0, host="a")  # nothing measured at all is no division by zero
    assert straggler_report(tmp_path)["slow_ranks"] == []
