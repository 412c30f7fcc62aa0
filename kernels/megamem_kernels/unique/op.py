"""Distinct ids: validation and choice of the mechanism."""

from __future__ import annotations

import threading

import numpy as np

from megamem_kernels.unique.cpu import bitmap_unique, largest, radix_unique

BITMAP_BOUND = 1 << 22
"""Largest id space for the bitmap: 1 MiB of words, what a second-level cache holds. The radix sort wins beyond."""

_DIGIT_BITS = 11
"""Widest digit: the counters of one digit, and one cache line for each place written to, fit the first two caches."""


class _Scratch(threading.local):
    """Buffers of one thread, kept between calls: at most ``BITMAP_BOUND / 4`` bytes and 16 bytes per id of the longest call."""

    def __init__(self) -> None:
        self._words = np.zeros(0, dtype=np.uint64)
        self._entries = np.empty(0, dtype=np.uint64)

    def words(self, count: int) -> np.ndarray:
        """``count`` uint64 zeros, which the caller leaves zero."""
        if self._words.size < count:
            self._words = np.zeros(count, dtype=np.uint64)
        return self._words[:count]

    def entries(self, count: int) -> np.ndarray:
        """``[2, count]`` uint64 with any content."""
        if self._entries.size < 2 * count:
            self._entries = np.empty(2 * count, dtype=np.uint64)
        return self._entries[: 2 * count].reshape(2, count)


_scratch = _Scratch()


def unique(ids: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids in ascending order, and where each id is among them.

    Time grows with the number of ids, not with ``bound``. Serial; may be called from several threads.

    Args:
        ids: ``[n]`` int64.
        bound: Size of the id space; ``n * bound`` may not exceed ``2**62``.

    Returns:
        ``unique`` ``[u]`` int64, ascending, and ``inverse`` ``[n]`` int64 with ``unique[inverse[i]] == ids[i]``.

    Raises:
        ValueError: an id is not in ``[0, bound)``, or there are too many of them.
    """
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    count = len(ids)
    if count and largest(ids) >= bound:
        bad = ids[np.flatnonzero((ids < 0) | (ids >= bound))[0]]
        raise ValueError(f"id {bad} is not in [0, {bound})")
    if count * bound > 2**62:
        raise ValueError(f"{count} ids of {bound} do not fit words of 64 bits")
    distinct = np.empty(count, dtype=np.int64)
    inverse = np.empty(count, dtype=np.int64)
    if bound <= BITMAP_BOUND:
        words = -(-bound // 32)
        scratch = _scratch.words(words + -(-words // 64))
        found = bitmap_unique(ids, scratch[:words], scratch[words:], distinct, inverse)
    else:
        id_bits = (bound - 1).bit_length()
        digits = -(-id_bits // _DIGIT_BITS)
        digit_bits = -(-id_bits // digits)
        starts = np.empty((digits, 1 << digit_bits), dtype=np.int64)
        source, target = _scratch.entries(count)
        found = radix_unique(ids, count.bit_length(), digit_bits, starts, source, target, distinct, inverse)
    return distinct[:found], inverse
