"""Distinct ids and their inverse, by both mechanisms, against the definition."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megamem_kernels.unique import unique
from megamem_kernels.unique.op import BITMAP_BOUND
from megamem_kernels.unique.reference import unique_reference

BOUNDS = [1, 31, 33, 2049, 100_003, BITMAP_BOUND, BITMAP_BOUND + 1, 36_200_000, 2**31 + 11, 2**41]


def draw(bound: int, count: int) -> np.ndarray:
    """Uniform, repeated and neighbouring ids, with both ends of the space."""
    rng = np.random.default_rng([bound, count])
    ids = rng.integers(0, bound, count)
    ids[count // 3 : count // 2] = ids[0] if count else 0
    ids[count // 2 : count // 2 + 2] = (0, bound - 1)[: max(0, count - count // 2)]
    near = ids[3 * count // 4 :]
    near[:] = np.minimum(near[:1] + np.arange(near.size) % 70, bound - 1)
    return ids


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("count", [0, 1, 2, 33, 1000, 20_000])
def test_follows_the_definition(bound: int, count: int) -> None:
    ids = draw(bound, count)
    before = ids.copy()
    distinct, inverse = unique(ids, bound)
    assert distinct.dtype == inverse.dtype == np.int64
    for ours, expected in zip((distinct, inverse), unique_reference(ids, bound), strict=True):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(ids, before)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("bad", [-1, 0, -(2**63), 2**63 - 1])
def test_an_id_outside_is_named(bound: int, bad: int) -> None:
    """0 stands for the bound itself, the first id that is too large. The call after the refused one is not disturbed."""
    bad = bad or bound
    ids = draw(bound, 50)
    ids[[7, 9]] = (bad, bad - 1 if bad > bound else bad)
    with pytest.raises(ValueError, match=rf"^id {bad} is not in \[0, {bound}\)$"):
        unique(ids, bound)
    good = draw(bound, 50)
    np.testing.assert_array_equal(unique(good, bound)[0], np.unique(good))


def test_ids_that_fit_no_word_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        unique(np.zeros(5, dtype=np.int64), 2**60)


def test_strided_and_read_only_ids() -> None:
    ids = draw(5000, 300)
    ids.setflags(write=False)
    distinct, inverse = unique(ids[::3], 5000)
    np.testing.assert_array_equal(distinct[inverse], ids[::3])


def test_reused_buffers_leave_earlier_results_alone() -> None:
    """Of any two calls, whichever mechanism and size each takes."""
    kept = []
    for bound in [2**25, 4097, 2**33, 100, BITMAP_BOUND, 50]:
        for count in (100, 3000, 10):
            ids = draw(bound, count)
            kept.append((ids, *unique(ids, bound)))
    for ids, distinct, inverse in kept:
        np.testing.assert_array_equal(distinct, np.unique(ids))
        np.testing.assert_array_equal(distinct[inverse], ids)


def test_threads_do_not_share_buffers() -> None:
    jobs = [(draw(bound, count), bound) for bound in BOUNDS[3:] for count in (20_000, 30_000)] * 3
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: unique(*job), jobs))
    for (ids, _), (distinct, inverse) in zip(jobs, results, strict=True):
        np.testing.assert_array_equal(distinct, np.unique(ids))
        np.testing.assert_array_equal(distinct[inverse], ids)
