from __future__ import annotations

import json
import threading
from collections import OrderedDict

import numpy as np
import pytest

from megamem.memory.access import AccessTrace, cache_sizes
from megamem.memory.stats import StepStats


def _steps(rows: int, lookups: int, steps: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Zipf(1.05) lookups, as the distinct rows and counts of each step."""
    generator = np.random.default_rng(seed)
    weights = np.arange(1, rows + 1) ** -1.05
    names = generator.permutation(rows)
    return [
        np.unique(names[generator.choice(rows, lookups, p=weights / weights.sum())], return_counts=True)
        for _ in range(steps)
    ]


def _lru_hit_rate(stream: np.ndarray, size: int) -> float:
    """Hits of an LRU cache of ``size`` rows, by simulation."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in stream.tolist():
        hits += row in cache
        cache[row] = None
        cache.move_to_end(row)
        if len(cache) > size:
            cache.popitem(last=False)
    return hits / max(1, len(stream))


def _trace(rows: int, steps: list[tuple[np.ndarray, np.ndarray]], **options: int) -> AccessTrace:
    trace = AccessTrace(rows, **options)
    for ids, counts in steps:
        trace.record(ids, counts)
    return trace


@pytest.mark.parametrize(
    ("rows", "lookups", "steps", "limit"), [(50, 40, 30, 50), (997, 300, 25, 4096), (7, 3, 200, 7)]
)
def test_hit_rates_are_those_of_a_simulated_cache(rows: int, lookups: int, steps: int, limit: int) -> None:
    data = _steps(rows, lookups, steps)
    summary = _trace(rows, data, sampled_rows=limit).summary()
    by_step = np.concatenate([ids for ids, _ in data])
    by_lookup = np.concatenate([np.repeat(ids, counts) for ids, counts in data])
    assert summary["sampled"] == 1 and summary["accesses"] == len(by_step) and summary["lookups"] == len(by_lookup)
    curve = summary["hit_rate"]
    assert curve["rows"] == cache_sizes(rows).tolist() and curve["rows"][-1] == rows
    for size, of_steps, of_lookups in zip(curve["rows"], curve["steps"], curve["lookups"], strict=True):
        assert of_steps == pytest.approx(_lru_hit_rate(by_step, size), abs=1e-5)
        assert of_lookups == pytest.approx(_lru_hit_rate(by_lookup, size), abs=1e-5)


def test_heat_counts_every_row_where_all_are_followed() -> None:
    rows, data = 997, _steps(997, 500, 40)
    summary = _trace(rows, data).summary()
    totals = np.zeros(rows, dtype=np.int64)
    for ids, counts in data:
        totals[ids] += counts
    hottest = np.sort(totals)[::-1]
    assert summary["distinct_rows"] == np.count_nonzero(totals)
    assert summary["hot_rows"]["rows"] == [1, 10, 100]
    assert summary["hot_rows"]["share"] == pytest.approx(np.cumsum(hottest)[[0, 9, 99]] / totals.sum(), abs=1e-5)
    heat = summary["heat"]
    assert heat["rows"] == [np.count_nonzero((totals >= low) & (totals < 2 * low)) for low in heat["lookups"]]
    assert heat["rows"][-1] > 0


def test_a_sample_estimates_what_following_every_row_gives() -> None:
    rows, data = 200_000, _steps(200_000, 20_000, 12)
    exact = _trace(rows, data, sampled_rows=rows).summary()
    trace = _trace(rows, data, sampled_rows=4096)
    estimate = trace.summary()
    assert exact["sampled"] == 1 and 2**-6 <= estimate["sampled"] <= 2**-3
    assert estimate["distinct_rows"] == pytest.approx(exact["distinct_rows"], rel=0.05)
    sizes = estimate["hit_rate"]["rows"]
    assert sizes[0] >= 1 / estimate["sampled"]  # a smaller cache is finer than the sample can tell
    for name in ("steps", "lookups"):
        truth = np.interp(sizes, exact["hit_rate"]["rows"], exact["hit_rate"][name])
        assert estimate["hit_rate"][name] == pytest.approx(truth, abs=0.02)
        assert np.all(np.diff(estimate["hit_rate"][name]) >= 0)
    assert estimate["hot_rows"]["rows"] == exact["hot_rows"]["rows"]
    assert estimate["hot_rows"]["share"] == pytest.approx(exact["hot_rows"]["share"], abs=0.02)
    assert estimate["hot_rows"]["share"][:2] == pytest.approx(exact["hot_rows"]["share"][:2], rel=0.03)
    assert sum(estimate["heat"]["rows"]) == pytest.approx(exact["distinct_rows"], rel=0.05)


def test_one_row_looked_up_all_the_time() -> None:
    summary = _trace(10**9, [(np.array([2**31 + 5]), np.array([8]))] * 50).summary()
    assert summary["hot_rows"] == {"rows": [1], "share": [1.0]}
    assert summary["heat"]["rows"] == [0] * 8 + [1] and summary["distinct_rows"] == 1
    assert summary["hit_rate"]["steps"] == [0.98] * len(summary["hit_rate"]["rows"])
    assert set(summary["hit_rate"]["lookups"]) == {0.9975}


def test_a_single_pass_over_a_table_larger_than_the_sample() -> None:
    rows = 300_000
    passes = [(np.arange(i, i + 30_000), np.ones(30_000, dtype=np.int64)) for i in range(0, rows, 30_000)]
    once = _trace(rows, passes, sampled_rows=8192).summary()
    assert max(once["hit_rate"]["steps"]) < 0.03
    assert once["distinct_rows"] == pytest.approx(rows, rel=0.03)
    assert once["hot_rows"]["share"][:3] == pytest.approx([1 / rows, 10 / rows, 100 / rows], abs=1e-4)
    twice = _trace(rows, passes * 2, sampled_rows=8192).summary()["hit_rate"]
    assert max(rate for size, rate in zip(twice["rows"], twice["steps"], strict=True) if size < 0.9 * rows) < 0.03
    assert twice["steps"][-1] == pytest.approx(0.5, abs=0.03)  # only a cache of the whole table helps a scan


def test_empty_steps_and_an_empty_trace_have_summaries() -> None:
    empty = np.empty(0, dtype=np.int64)
    for trace in (AccessTrace(1), _trace(33, [(empty, empty)] * 3)):
        summary = trace.summary()
        assert summary["lookups"] == 0 and summary["hot_rows"] == {"rows": [], "share": []}
        assert set(summary["hit_rate"]["steps"]) == {0.0}
        assert json.loads(json.dumps(summary)) == summary


def test_times_are_renumbered_without_a_trace() -> None:
    """A small sample runs out of times every few steps; a large one never does."""
    data = _steps(64, 40, 300)
    assert _trace(64, data, sampled_rows=64).summary() == _trace(64, data, sampled_rows=4096).summary()


def test_memory_does_not_grow_with_the_table() -> None:
    generator = np.random.default_rng(0)
    trace = AccessTrace(2**40, sampled_rows=1024)
    for _ in range(20):
        ids = np.unique(generator.integers(0, 2**40, 5000))
        trace.record(ids, np.ones(len(ids), dtype=np.int64))
    parts = [vars(part).values() for part in (trace._sample, trace._heavy)]
    held = sum(value.nbytes for values in parts for value in values if isinstance(value, np.ndarray))
    assert held < 1024 * 100
    assert trace.summary()["accesses"] > 99_000


def test_a_summary_can_be_taken_while_another_thread_records() -> None:
    trace, data = AccessTrace(5000, sampled_rows=512), _steps(5000, 2000, 40)
    recorder = threading.Thread(target=lambda: [trace.record(*step) for step in data])
    recorder.start()
    seen = [trace.summary()["lookups"] for _ in range(20)]
    recorder.join()
    assert seen == sorted(seen) and all(count % 2000 == 0 for count in seen)
    assert trace.summary() == _trace(5000, data, sampled_rows=512).summary()


def test_step_stats_are_flat_numbers() -> None:
    stats = StepStats(lookups=200, unique_rows=50, rows_received=80, patched_rows=20, stale_rows=3)
    stats.count_io("host", "read", rows=10, nbytes=640)
    stats.count_io("host", "read", rows=5, nbytes=320)
    stats.count_io("disk", "written", rows=2, nbytes=128)
    stats.resident_bytes = {"host": 4096, "disk": 65536}
    stats.touched_rows["t"] = 7
    flat = stats.as_dict()
    assert flat["unique_ratio"] == 0.25 and flat["patch_ratio"] == 0.25 and flat["stale_rows"] == 3
    assert {key: value for key, value in flat.items() if "/" in key} == {
        "touched_rows/t": 7,
        "rows_read/host": 15,
        "bytes_read/host": 960,
        "rows_written/disk": 2,
        "bytes_written/disk": 128,
        "resident_bytes/host": 4096,
        "resident_bytes/disk": 65536,
    }
    assert all(isinstance(value, int | float) for value in flat.values())
    with stats.timed("fetch_seconds", "plan_seconds"):
        pass
    assert 0 < stats.fetch_seconds == stats.plan_seconds
    assert StepStats().as_dict()["unique_ratio"] == StepStats().as_dict()["patch_ratio"] == 0
