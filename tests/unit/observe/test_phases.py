"""Phases add up to the time between reports, leave out what is inside them, and balance."""

from __future__ import annotations

import time

import pytest
import torch

from megamem.observe.phases import Phases, ScheduleTimers


def test_times_are_exclusive_and_add_up() -> None:
    marks = Phases()
    marks.take()
    began = time.perf_counter()
    with marks("forward"):
        time.sleep(0.02)
        with marks("pipeline_wait"):
            time.sleep(0.03)
    time.sleep(0.01)
    seconds = marks.take()
    elapsed = time.perf_counter() - began
    assert set(seconds) == {"forward", "pipeline_wait", "other"}
    assert seconds["forward"] >= 0.02 and seconds["pipeline_wait"] >= 0.03 and seconds["other"] >= 0.01
    assert sum(seconds.values()) == pytest.approx(elapsed, abs=0.02)
    assert all(marks.totals()[name] >= value for name, value in seconds.items())
    assert sum(marks.take().values()) < 0.05  # what was taken is not counted again


def test_an_error_leaves_the_phase() -> None:
    marks = Phases()
    with pytest.raises(KeyError), marks("data"):
        raise KeyError
    assert marks.current == "other"
    assert marks.sequence == 1


def test_schedule_timers_name_computation_and_waiting() -> None:
    marks = Phases()
    timers = ScheduleTimers(marks)
    seen = []
    for name in ("forward-backward", "forward-compute", "backward-compute", "forward-send-backward-recv"):
        timers(name, log_level=2).start(barrier=True)
        seen.append(marks.current)
        timers(name).stop()
    assert seen == ["other", "forward", "backward", "pipeline_wait"]
    assert marks.current == "other"


def test_phases_are_ranges_of_a_trace_only_when_asked() -> None:
    marks = Phases()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with marks("data"):
            torch.ones(1)
        marks.trace = True
        with marks("forward"):
            torch.ones(1)
    names = {event.name for event in profile.events()}
    assert "forward" in names and "data" not in names


def test_boundaries_wait_for_the_device_when_asked() -> None:
    marks = Phases()
    waits = []
    marks.synchronize = lambda: waits.append(1)
    with marks("forward"):
        pass
    assert len(waits) == 2
