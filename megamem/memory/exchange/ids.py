"""Passes over lists of ids and over message bytes, compiled: each reads its input once."""

from __future__ import annotations

import numpy as np
from numba import uint64

from megamem_kernels.jit import njit

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_HALF = np.uint64(32)


@njit(nogil=True, cache=True, error_model="numpy")
def checksum(words: np.ndarray) -> np.uint64:
    """64-bit checksum of uint64 ``words``, which depends on their order.

    A sum of terms that are each a bijection of one word, different at every place: a change within one word is always found,
    any other (words swapped, shifted, repeated) with probability ``1 - 2**-64`` for data that does not aim at it.
    """
    total = uint64(0)
    place = _STEP
    for i in range(words.shape[0]):
        word = words[i] + place
        word = (word ^ (word >> _HALF)) * _FACTOR
        total += word ^ (word >> _HALF)
        place += _STEP
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def admit(ids: np.ndarray, limit: int, out: np.ndarray) -> int:
    """Copy ``ids`` (int32 or int64) to ``out`` (int64) while they ascend within ``[0, limit)``; the place of the first that
    does not, or -1."""
    previous = np.int64(-1)
    for i in range(ids.shape[0]):
        value = np.int64(ids[i])
        if value <= previous or value >= limit:
            return i
        out[i] = value
        previous = value
    return -1


@njit(nogil=True, cache=True, error_model="numpy")
def mark_common(flags: np.ndarray, ids: np.ndarray, touched: np.ndarray) -> None:
    """Set ``flags[i]`` (uint8) where ``ids[i]`` is in ``touched``; both int64 and ascending."""
    i = 0
    for j in range(touched.shape[0]):
        while i < ids.shape[0] and ids[i] < touched[j]:
            i += 1
        if i < ids.shape[0] and ids[i] == touched[j]:
            flags[i] = 1
