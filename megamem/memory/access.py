"""How a run reads its tables: which rows are hot, and what an LRU cache of any size would have held. Always on, bounded.

Every step brings the distinct rows of a stream and how often each was looked up. Two summaries of that, of a fixed size
whatever the table:

- **stack distances** (Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 1970): an access hits
  an LRU cache of ``c`` rows if fewer than ``c`` other rows were accessed since the row's last access, so one pass gives the
  hit rate of every cache size. Kept exactly for a sample of the rows that is chosen by the hash of their ids, and scaled: SHARDS
  with a fixed sample size and its correction of the total (Waldspurger et al., "Efficient MRC construction with SHARDS",
  FAST 2015);
- **heavy rows**: counts of the rows that the sample would miss, a few that are read all the time, by Misra and Gries ("Finding
  repeated elements", 1982) in the form for batches (Agarwal et al., "Mergeable summaries", PODS 2012).
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import uint64

from megamem_kernels.jit import njit
from megamem_kernels.random import mix64

_SAMPLED_ROWS = 2**16
_SIZES_PER_OCTAVE = 4


class AccessTrace:
    """Access statistics of one stream, as one rank sees it. May be read while another thread records.

    Two streams of accesses are told apart. ``steps``: each row once per step in ascending order, what a cache between the
    steps and the tables would see. ``lookups``: every lookup of every token, those of one row in one step next to each
    other, since a step has all its rows at hand.

    Args:
        rows: Size of the id space.
        sampled_rows: Most rows that are followed; below that many different rows everything is exact.
    """

    def __init__(self, rows: int, *, sampled_rows: int = _SAMPLED_ROWS) -> None:
        self._rows, self._steps, self._accesses, self._lookups = rows, 0, 0, 0
        self._sizes = cache_sizes(rows)
        self._hits = np.zeros(len(self._sizes), dtype=np.int64)
        self._cold = 0
        self._sample = _Sample(sampled_rows)
        self._heavy = _HeavyRows(sampled_rows)
        self._lock = threading.Lock()

    def record(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Count one step.

        Args:
            ids: ``[u]`` int64, distinct rows in ascending order.
            counts: ``[u]`` int64, lookups of each, at least 1.
        """
        with self._lock:
            self._steps += 1
            self._accesses += len(ids)
            self._lookups += int(counts.sum())
            self._heavy.add(ids, counts)
            distances = self._sample.access(ids, counts)
            seen = distances[distances > 0]
            weight = 1 << self._sample.shift
            self._cold += weight * (len(distances) - len(seen))
            self._hits += weight * np.bincount(self._bins(seen), minlength=len(self._sizes))
            # What the sample has too few or too many of is mostly rows that every step reads: SHARDS counts the difference as
            # hits of any cache, but such a row comes back after the other rows of one step.
            self._hits[self._bins(len(ids))] += len(ids) - weight * len(distances)

    def _bins(self, distances: np.ndarray | int) -> np.ndarray:
        """Index of the smallest cache that holds rows at these stack distances."""
        return np.searchsorted(self._sizes, distances).clip(max=len(self._sizes) - 1)

    def summary(self) -> dict[str, Any]:
        """What was recorded, as JSON. ``steps``, ``accesses`` (distinct rows, summed over steps), ``lookups``, ``rows``;
        ``sampled`` (share of rows that were followed; 1: everything below is exact) and ``distinct_rows``;

        - ``hot_rows``: ``share[i]`` of all lookups went to the ``rows[i]`` hottest rows;
        - ``heat``: ``rows[i]`` rows were looked up from ``lookups[i]`` up to, but not including, twice as many times;
        - ``hit_rate``: an LRU cache of ``rows[i]`` rows would have served ``steps[i]`` of the accesses and ``lookups[i]`` of
          the lookups. A row's first access is a miss.
        """
        with self._lock:
            counts, weights, lookups = self._hottest_first()
            shift = self._sample.shift
            return {
                "rows": self._rows,
                "steps": self._steps,
                "accesses": self._accesses,
                "lookups": self._lookups,
                "sampled": 2.0**-shift,
                "distinct_rows": min(round(float(weights.sum())), self._rows),
                "hot_rows": _hot_rows(lookups, weights, self._lookups),
                "heat": _heat(counts, weights),
                "hit_rate": self._hit_rate(1 << shift),
            }

    def _hit_rate(self, resolution: int) -> dict[str, list[Any]]:
        hits = np.maximum.accumulate(np.cumsum(self._hits).clip(0, self._accesses))
        repeats = self._lookups - self._accesses
        shown = self._sizes >= min(resolution, self._rows)
        return {
            "rows": self._sizes[shown].tolist(),
            "steps": _rounded(hits[shown] / max(1, self._accesses)),
            "lookups": _rounded((hits[shown] + repeats) / max(1, self._lookups)),
        }

    def _hottest_first(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lookups of a row, descending, with how many rows it stands for and the lookups of all of those."""
        counts = self._sample.counts
        weights = np.full(len(counts), float(1 << self._sample.shift))
        lookups = counts * weights
        if self._sample.shift:
            # Every row looked up more often than this is among the heavy ones, and its count is right within a factor of two.
            limit = 2 * self._heavy.uncertainty
            estimates = self._heavy.counts + self._heavy.uncertainty
            hot, cold = estimates[estimates > limit], counts[counts <= limit]
            rest = max(0, self._lookups - int(hot.sum())) / max(1, int(cold.sum()))
            counts = np.concatenate([hot, cold])
            weights = np.concatenate([np.ones(len(hot)), weights[: len(cold)]])
            lookups = np.concatenate([hot, cold * rest])
        order = np.argsort(-counts, kind="stable")
        return counts[order], weights[order], lookups[order]


def cache_sizes(rows: int) -> np.ndarray:
    """Cache sizes in rows, int64 ascending, from 1 to ``rows``, four to a doubling."""
    steps = np.arange(np.log2(max(rows, 1)) * _SIZES_PER_OCTAVE + 1)
    return np.unique([*np.rint(2.0 ** (steps / _SIZES_PER_OCTAVE)).astype(np.int64).clip(max=rows), rows])


class _Sample:
    """Rows whose hash begins with ``shift`` zero bits, when each was accessed last, and how often it was looked up."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.shift = 0
        """The sample holds one row of ``2 ** shift``."""
        self._ids = np.empty(0, dtype=np.int64)
        self.counts = np.empty(0, dtype=np.int64)
        """Lookups of each sampled row since the beginning."""
        self._times = np.empty(0, dtype=np.int64)
        self._now = 0
        # Counts of the last accesses at and before each time: a Fenwick tree, from index 1.
        self._tree = np.zeros(4 * limit + 1, dtype=np.int64)

    def access(self, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Estimated stack distances of the accesses to sampled rows among ``ids``: from 1, and 0 for a first access."""
        at, known, chosen = self._select(ids)
        while len(self._ids) + np.count_nonzero(~known) > self._limit:
            self.shift += 1
            self._keep(_in_sample(self._ids, self.shift))
            at, known, chosen = self._select(ids)
        if self._now + len(at) >= len(self._tree):
            self._renumber()
        times = np.full(len(at), -1, dtype=np.int64)
        times[known] = self._times[at[known]]
        others = _others_since(self._tree, len(self._ids), times, self._now)
        now = np.arange(self._now, self._now + len(at))
        self._now += len(at)
        self._times[at[known]] = now[known]
        self.counts[at[known]] += counts[chosen][known]
        new, before = ~known, at[~known]
        self._ids = np.insert(self._ids, before, ids[chosen][new])
        self._times = np.insert(self._times, before, now[new])
        self.counts = np.insert(self.counts, before, counts[chosen][new])
        return np.where(known, (others << self.shift) + 1, 0)

    def _select(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the sampled rows among ``ids``: their places, whether they are known, and their indices in ``ids``."""
        chosen = np.flatnonzero(_in_sample(ids, self.shift))
        return *_find(self._ids, ids[chosen]), chosen

    def _keep(self, kept: np.ndarray) -> None:
        self._ids, self._times, self.counts = self._ids[kept], self._times[kept], self.counts[kept]
        self._renumber()

    def _renumber(self) -> None:
        """Times without gaps, in the same order."""
        self._now = len(self._ids)
        self._times[np.argsort(self._times)] = np.arange(self._now)
        index = np.arange(len(self._tree))
        self._tree = np.minimum(index, self._now) - np.minimum(index - (index & -index), self._now)


class _HeavyRows:
    """Lower bounds of the lookups of the hottest rows; no bound is off by more than ``uncertainty``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.uncertainty = 0
        self._ids = np.empty(0, dtype=np.int64)
        self.counts = np.empty(0, dtype=np.int64)

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Count lookups of distinct ascending rows."""
        at, known = _find(self._ids, ids)
        self.counts[at[known]] += counts[known]
        self._ids = np.insert(self._ids, at[~known], ids[~known])
        self.counts = np.insert(self.counts, at[~known], counts[~known])
        if len(self._ids) > 2 * self._limit:
            excess = int(np.sort(self.counts)[-self._limit - 1])  # np.partition is slow where many counts are the same
            kept = self.counts > excess
            self._ids, self.counts = self._ids[kept], self.counts[kept] - excess
            self.uncertainty += excess


def _find(sorted_ids: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of ``ids`` in ``sorted_ids``, and whether they are there."""
    at = np.searchsorted(sorted_ids, ids)
    known = at < len(sorted_ids)
    known[known] = sorted_ids[at[known]] == ids[known]
    return at, known


@njit(nogil=True, cache=True)
def _in_sample(ids: np.ndarray, shift: int) -> np.ndarray:
    """Whether the hash of each id begins with ``shift`` zero bits."""
    result = np.ones(len(ids), dtype=np.bool_)
    if shift:
        for i in range(len(ids)):
            result[i] = mix64(uint64(ids[i])) >> uint64(64 - shift) == 0
    return result


@njit(nogil=True, cache=True)
def _others_since(tree: np.ndarray, live: int, times: np.ndarray, now: int) -> np.ndarray:
    """Rows accessed after ``times[i]`` when access ``i`` comes, which moves its row to time ``now + i``.

    ``tree`` counts the ``live`` rows by the time of their last access. A time of -1 is a row without one.
    """
    others = np.zeros(len(times), dtype=np.int64)
    size = len(tree)
    for i in range(len(times)):
        if times[i] >= 0:
            earlier, node = 0, times[i] + 1
            while node > 0:
                earlier += tree[node]
                node -= node & -node
            others[i] = live - earlier
            node = times[i] + 1
            while node < size:
                tree[node] -= 1
                node += node & -node
        else:
            live += 1
        node = now + i + 1
        while node < size:
            tree[node] += 1
            node += node & -node
    return others


def _hot_rows(lookups: np.ndarray, weights: np.ndarray, total: int) -> dict[str, list[Any]]:
    covered, rows = np.cumsum(lookups), np.cumsum(weights)
    tops: list[int] = [10**k for k in range(int(np.log10(max(1.0, rows[-1]))) + 1)] if len(rows) else []
    # From the origin: within a group of rows that one sampled row stands for, each has its part.
    shares = np.interp(tops, np.append(0, rows), np.append(0, covered)) / max(1, total)
    return {"rows": tops, "share": _rounded(shares.clip(max=1.0))}


def _heat(counts: np.ndarray, weights: np.ndarray) -> dict[str, list[int]]:
    octave = np.frexp(counts)[1] - 1  # exact floor(log2(count))
    rows = np.bincount(octave, weights=weights) if len(counts) else np.empty(0)
    return {"lookups": [1 << k for k in range(len(rows))], "rows": [round(float(n)) for n in rows]}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in values]
