"""Ranges over threads: coverage, concurrent callers, errors, forks; and the random words that kernels draw."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from megamem_kernels.parallel import for_ranges, set_threads, threads
from megamem_kernels.random import GOLDEN, key_of, row_key, word


@pytest.fixture(autouse=True)
def _all_cores_again() -> Iterator[None]:
    yield
    set_threads(0)


def test_number_of_threads() -> None:
    assert threads() == len(os.sched_getaffinity(0))
    set_threads(5)
    assert threads() == 5
    with pytest.raises(ValueError, match="-1 threads"):
        set_threads(-1)
    assert threads() == 5


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("grain", [0, 1, 3, 10_000])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_every_item_once_in_ranges_worth_a_thread(count: int, grain: int, parts: int) -> None:
    set_threads(parts)
    seen = np.zeros(count, dtype=np.int64)
    ranges = []

    def visit(low: int, high: int) -> None:
        ranges.append(high - low)
        seen[low:high] += 1

    for_ranges(visit, count, grain=grain)
    assert (seen == 1).all()
    assert len(ranges) <= parts
    assert len(ranges) == 1 or all(size >= grain for size in ranges) or not count


def test_ranges_run_at_the_same_time() -> None:
    """Each range waits for the others, which only ranges on threads of their own can end."""
    set_threads(3)
    meeting, met = threading.Barrier(3, timeout=20), []
    for_ranges(lambda low, high: met.append(meeting.wait()), 3, grain=1)
    assert sorted(met) == [0, 1, 2]


def test_concurrent_callers_and_changes_of_the_number() -> None:
    set_threads(3)
    wrong: list[object] = []
    stop = threading.Event()

    def call(size: int) -> None:
        while not stop.is_set():
            seen = np.zeros(size, dtype=np.int64)

            def visit(low: int, high: int, seen: np.ndarray = seen) -> None:
                seen[low:high] += 1

            try:
                for_ranges(visit, size, grain=1)
            except BaseException as error:
                wrong.append(error)
                return
            if not (seen == 1).all():
                wrong.append(seen)

    callers = [threading.Thread(target=call, args=(size,)) for size in (10, 11, 999)]
    for caller in callers:
        caller.start()
    for number in range(60):
        set_threads(1 + number % 4)
        time.sleep(0.005)
    stop.set()
    for caller in callers:
        caller.join(20)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


@pytest.mark.parametrize("slowest", [0, 3])
@pytest.mark.parametrize("failing", [(0,), (2,), (1, 2), (0, 1), (0, 1, 2, 3)])
def test_the_first_error_after_all_ranges_have_ended(failing: tuple[int, ...], slowest: int) -> None:
    set_threads(4)
    ended = []

    def work(low: int, high: int) -> None:
        time.sleep(0.02 * (3 - abs(low - slowest)))
        ended.append(low)
        if low in failing:
            raise RuntimeError(f"range {low}")

    with pytest.raises(RuntimeError, match=f"range {failing[0]}"):
        for_ranges(work, 4, grain=1)
    assert sorted(ended) == [0, 1, 2, 3]
    for_ranges(lambda low, high: ended.append(low), 4, grain=1)
    assert len(ended) == 8


def test_a_forked_process_has_threads_of_its_own() -> None:
    set_threads(2)
    for_ranges(lambda low, high: None, 2, grain=1)
    child = os.fork()
    if not child:
        seen: list[int] = []
        for_ranges(lambda low, high: seen.append(low), 2, grain=1)
        os._exit(0 if sorted(seen) == [0, 1] else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def _mix64(x: int) -> int:
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("row", [0, 2**31, 2**41])
def test_random_words(key: int, row: int) -> None:
    """The published finaliser over the documented counters; ``_mix64(GOLDEN)`` is splitmix64's first word for seed 0."""
    assert _mix64(GOLDEN) == 0xE220A8397B1DCDAF
    keyed = _mix64(_mix64(key + 7 * GOLDEN) ^ row)
    assert int(row_key(np.uint64(key), np.uint64(7), np.uint64(row))) == keyed
    assert int(row_key(np.uint64(key), 7, row)) == keyed
    assert int(word(np.uint64(keyed), 3)) == _mix64(keyed + 4 * GOLDEN)


def test_keys_are_stable() -> None:
    assert key_of("table", 1) == 0xF7B686185521B804
    assert len({key_of("table", 1), key_of("table", 2), key_of("rows", 1)}) == 3
