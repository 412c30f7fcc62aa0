"""The n-gram hash over whole arrays."""

from __future__ import annotations

import numpy as np


def ngram_hash(
    tokens: np.ndarray,
    document_ids: np.ndarray,
    *,
    multipliers: np.ndarray,
    primes: np.ndarray,
    offsets: np.ndarray,
    pad_id: int,
    context: int = 0,
) -> np.ndarray:
    """Row ids of the suffix n-grams of orders 2, 3, ... that end at each position (arXiv 2601.07372, section 2.2).

    The n-gram of order ``n`` at position ``t`` hashes to ``(x[t] m[0]) ^ (x[t-1] m[1]) ^ ... ^ (x[t-n+1] m[n-1])``,
    taken modulo one prime per head. Look-back that would leave the document, or the array, reads ``pad_id``.

    Args:
        tokens: ``[b, s]`` int64 ids (canonical ones where tokens are folded), small enough that no product with a
            multiplier leaves int64.
        document_ids: ``[b, s]`` integers; each document is one contiguous run.
        multipliers: ``[orders + 1]`` int64, odd; ``multipliers[k]`` belongs to look-back ``k``.
        primes: ``[orders, heads]`` int64 table sizes.
        offsets: ``[orders * heads]`` int64, first row of each head.
        pad_id: the id that stands for missing context.
        context: leading positions that are looked back on but not hashed themselves.

    Returns:
        ``[b, s - context, orders * heads]`` int64: all heads of order 2, then of order 3, and so on.
    """
    batch, length = tokens.shape
    orders, heads = primes.shape
    rows = np.empty((batch, length - context, orders * heads), dtype=np.int64)
    mix = tokens[:, context:] * multipliers[0]
    earlier = np.empty_like(mix)
    for order in range(orders):
        back = order + 1
        first = max(context, back)  # of the hashed positions, the first whose look-back lies in the array
        earlier.fill(pad_id)
        if first < length:
            same = document_ids[:, first - back : length - back] == document_ids[:, first:]
            np.copyto(earlier[:, first - context :], tokens[:, first - back : length - back], where=same)
        earlier *= multipliers[back]
        mix ^= earlier
        for column in range(order * heads, back * heads):
            np.remainder(mix, primes.flat[column], out=rows[:, :, column])
    rows += offsets
    return rows
