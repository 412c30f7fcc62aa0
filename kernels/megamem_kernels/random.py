"""Random bits that are a function of (key, step, row, element) alone: the same for any owner, tier, thread or device.

A counter-based generator made of the splitmix64 finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014)::

    mix64(x):  x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x >> 31
    row_key(key, step, row) = mix64(mix64(key + step * GOLDEN) ^ row)
    word(row_key, i) = mix64(row_key + (i + 1) * GOLDEN)          64 bits; GOLDEN = 0x9E3779B97F4A7C15

All arithmetic is modulo 2**64. The functions below compile into CPU kernels; Triton kernels repeat them in their language.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numba import uint64

from megamem_kernels.jit import njit

GOLDEN = 0x9E3779B97F4A7C15
_GOLDEN = np.uint64(GOLDEN)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def key_of(*parts: object) -> int:
    """A 64-bit key from names and numbers, the same on every machine."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# Arguments are cast in every function: the compiler turns a sum of int64 and uint64 into a double.
@njit(inline="always")
def mix64(x: np.uint64) -> np.uint64:
    """The finaliser; uint64 to uint64."""
    x = uint64(x)
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@njit(inline="always")
def row_key(key: np.uint64, step: np.uint64, row: np.uint64) -> np.uint64:
    """The key of one row in one step; integers of any kind, to uint64."""
    return mix64(mix64(uint64(key) + uint64(step) * _GOLDEN) ^ uint64(row))


@njit(inline="always")
def word(keyed_row: np.uint64, index: np.uint64) -> np.uint64:
    """The ``index``-th 64 random bits (from 0) of a row key; integers of any kind, to uint64."""
    return mix64(uint64(keyed_row) + (uint64(index) + uint64(1)) * _GOLDEN)
