"""Distinct ids on the CPU: ranks in a bitmap where the id space is small, a radix sort elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types, uint64
from numba.extending import intrinsic

from megamem_kernels.jit import njit

_ZERO, _ONE = np.uint64(0), np.uint64(1)
_5, _6, _31, _32, _63 = (np.uint64(shift) for shift in (5, 6, 31, 32, 63))


@intrinsic
def _trailing_zeros(typing_context: Any, word: Any) -> tuple[Any, Any]:
    """Index of the lowest set bit of a uint64 that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def _set_bits(typing_context: Any, word: Any) -> tuple[Any, Any]:
    """Number of set bits of a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@njit(nogil=True, cache=True)
def largest(ids: np.ndarray) -> np.uint64:
    """The largest of int64 ids seen as uint64, so that a negative one is larger than any valid one; 0 for none."""
    result = _ZERO
    for i in range(len(ids)):
        result = max(result, uint64(ids[i]))
    return result


@njit(nogil=True, cache=True)
def bitmap_unique(
    ids: np.ndarray, words: np.ndarray, summary: np.ndarray, unique: np.ndarray, inverse: np.ndarray
) -> int:
    """Distinct ids through one bit per possible id.

    Args:
        ids: ``[n]`` int64, ``n < 2**32``.
        words: uint64, zeros before and after: ids ``32 w`` to ``32 w + 31`` as the low half of word ``w``; its high half
            takes the number of distinct ids below ``32 w``.
        summary: uint64, zeros before and after: bit ``w % 64`` of word ``w // 64`` tells whether ``words[w]`` is in use,
            so that time does not grow with the id space.
        unique: ``[n]`` int64, the first entries written.
        inverse: ``[n]`` int64, written.

    Returns:
        Number of distinct ids.
    """
    for i in range(len(ids)):
        value = uint64(ids[i])
        word = value >> _5
        words[word] |= _ONE << (value & _31)
        summary[word >> _6] |= _ONE << (word & _63)
    count = 0
    for block in range(len(summary)):
        used = summary[block]
        while used:
            word = (uint64(block) << _6) | _trailing_zeros(used)
            used &= used - _ONE
            bits = words[word]
            words[word] = bits | (uint64(count) << _32)
            while bits:
                unique[count] = (word << _5) | _trailing_zeros(bits)
                count += 1
                bits &= bits - _ONE
    for i in range(len(ids)):
        value = uint64(ids[i])
        entry = words[value >> _5]
        inverse[i] = (entry >> _32) + _set_bits(entry & ((_ONE << (value & _31)) - _ONE))
    for block in range(len(summary)):
        used = summary[block]
        while used:
            words[(uint64(block) << _6) | _trailing_zeros(used)] = _ZERO
            used &= used - _ONE
        summary[block] = _ZERO
    return count


@njit(nogil=True, cache=True)
def radix_unique(
    ids: np.ndarray,
    index_bits: int,
    digit_bits: int,
    starts: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    unique: np.ndarray,
    inverse: np.ndarray,
) -> int:
    """Distinct ids through a radix sort, lowest digit first, of words that hold an id and its index.

    Args:
        ids: ``[n]`` int64.
        index_bits: Low bits of a word, which take the index in ``ids``; the id takes those above.
        digit_bits: Bits of one digit.
        starts: ``[digits, 2**digit_bits]`` int64, overwritten: as many digits as the largest id needs.
        source: ``[n]`` uint64, overwritten.
        target: ``[n]`` uint64, overwritten.
        unique: ``[n]`` int64, the first entries written.
        inverse: ``[n]`` int64, written.

    Returns:
        Number of distinct ids.
    """
    digits, buckets = starts.shape
    mask = uint64(buckets - 1)
    starts[:] = 0
    for i in range(len(ids)):
        value = uint64(ids[i])
        source[i] = (value << uint64(index_bits)) | uint64(i)
        for digit in range(digits):
            starts[digit, (value >> uint64(digit * digit_bits)) & mask] += 1
    for digit in range(digits):
        start = starts[digit]
        total = 0
        for bucket in range(buckets):
            size = start[bucket]
            start[bucket] = total
            total += size
        shift = uint64(index_bits + digit * digit_bits)
        for i in range(len(ids)):
            entry = source[i]
            bucket_of_entry = (entry >> shift) & mask
            target[start[bucket_of_entry]] = entry
            start[bucket_of_entry] += 1
        source, target = target, source
    index_mask = (_ONE << uint64(index_bits)) - _ONE
    last = -1
    previous = ~_ZERO
    for i in range(len(ids)):
        value = source[i] >> uint64(index_bits)
        last += value != previous
        previous = value
        unique[last] = value
        inverse[source[i] & index_mask] = last
    return last + 1
