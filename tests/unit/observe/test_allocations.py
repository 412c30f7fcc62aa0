"""Peak memory by kind from a list of allocations and frees."""

from __future__ import annotations

import threading

import pytest
import torch

from megamem.observe.allocations import (
    Allocation,
    Peak,
    Range,
    add_up,
    heap_free_bytes,
    kinds_of,
    peak_of,
    read_profile,
)
from megamem.observe.memory import peak_rss, reset_peak_rss
from megamem.observe.phases import Phases
from megamem.observe.profiler import bubble, step_times

RANGES = [
    Range("data", 0, 10),
    Range("forward", 10, 40),
    Range("pipeline_wait", 20, 25),
    Range("backward", 40, 60),
    Range("exchange", 60, 70),
    Range("dense_reduce", 70, 90),
]


def test_kinds_and_the_moment_of_the_peak() -> None:
    peak = peak_of(
        [
            Allocation(5, 1, 10),  # a message
            Allocation(12, 2, 100),  # an activation
            Allocation(22, 3, 50),  # received, an activation too
            Allocation(45, 4, 30),  # a gradient: still there when the exchange begins
            Allocation(46, 5, 7),  # made for the moment
            Allocation(47, 5, -7),
            Allocation(48, 2, -100),
            Allocation(49, 3, -50),
            Allocation(75, 6, 40),
            Allocation(80, 4, -30),
        ],
        RANGES,
    )
    assert peak == Peak(
        total=197,
        phase="backward",
        kinds={"buffers": 10, "activations": 157, "gradients": 30},
        largest={"buffers": 50, "activations": 157, "gradients": 30},
    )


def test_blocks_whose_end_or_beginning_was_not_seen() -> None:
    peak = peak_of(
        [
            Allocation(11, 9, -1000),  # older than the window
            Allocation(12, 1, 100),
            Allocation(13, 1, 60),  # the address again: a thread that is not recorded freed it
        ],
        RANGES,
    )
    assert (peak.total, peak.kinds) == (100, {"activations": 100})


def test_adding_up_leaves_nothing_out() -> None:
    peak = Peak(total=60, kinds={"gradients": 50, "activations": 10})
    kinds = add_up({"parameters": 20, "buffers": 1}, peak, gradients=30, held=500, free=40)
    assert kinds == {
        "parameters": 20,
        "gradients": 30,
        "activations": 10,
        "buffers": 21,
        "fragmentation": 40,
        "process": 379,
    }
    held = {"parameters_host": 1, "parameters_device": 2, "tables_disk": 4}
    assert kinds_of(held, ["device", "host"]) == {"parameters": 3}


def test_what_torch_reports() -> None:
    marks = Phases()
    marks.trace = True
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with marks("forward"):
            weight = torch.ones(1000, requires_grad=True)
            product = weight * weight
        with marks("backward"):
            product.sum().backward()
        thread = threading.Thread(target=lambda: torch.ones(5000))
        thread.start()
        thread.join()
        with marks("exchange"):
            pass
    allocations, ranges = read_profile(profile, "cpu")
    assert [r.name for r in ranges] == ["forward", "backward", "exchange"]
    peak = peak_of(allocations, ranges)
    assert peak.kinds["gradients"] == 4000
    assert 8000 <= peak.kinds["activations"] < 20_000 and peak.phase == "backward"
    assert read_profile(profile, "cuda")[0] == []


def test_peak_of_the_resident_set() -> None:
    if not reset_peak_rss():
        pytest.skip("this kernel does not let a process reset its peak")
    before = peak_rss()
    held = torch.ones(8 << 20)  # 32 MiB
    after = peak_rss()
    del held
    assert 24 << 20 < after - before < 64 << 20
    assert heap_free_bytes() >= 0


def test_bubble_and_step_times() -> None:
    measured = bubble(
        {"forward": 2.0, "backward": 4.0, "pipeline_wait": 3.0, "other": 1.0}, pp=3, vpp=2, micro_batches=4
    )
    assert measured == {"share_of_step": 0.3, "over_compute": 0.5, "formula": 0.25}
    assert step_times([1.0, 3.0, 2.0, 6.0]) == {"mean": 3.0, "median": 2.5, "min": 1.0, "max": 6.0}
