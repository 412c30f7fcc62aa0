"""The definition of the n-gram hash, one position at a time, and the vectorised form that published code uses."""

from __future__ import annotations

import numpy as np


def ngram_hash_reference(
    tokens: np.ndarray,
    documents: np.ndarray,
    *,
    multipliers: np.ndarray,
    primes: np.ndarray,
    offsets: np.ndarray,
    pad_id: int,
    context: int = 0,
) -> np.ndarray:
    """As :func:`megamem_kernels.ngram_hash.op.ngram_hash`, in plain loops over whole-number Python arithmetic."""
    batch, length = tokens.shape
    orders, heads = primes.shape
    rows = np.empty((batch, length - context, orders * heads), dtype=np.int64)
    for sequence in range(batch):
        for position in range(context, length):
            mix = int(tokens[sequence, position]) * int(multipliers[0])
            blocked = False
            for order in range(orders):
                back = position - order - 1
                blocked = blocked or back < 0 or documents[sequence, back] != documents[sequence, position]
                token = pad_id if blocked else int(tokens[sequence, back])
                mix ^= token * int(multipliers[order + 1])
                for head in range(heads):
                    column = order * heads + head
                    rows[sequence, position - context, column] = mix % int(primes[order, head]) + int(offsets[column])
    return rows


def ngram_hash_vectorized(
    tokens: np.ndarray,
    documents: np.ndarray,
    *,
    multipliers: np.ndarray,
    primes: np.ndarray,
    offsets: np.ndarray,
    pad_id: int,
    out: np.ndarray,
    scratch: np.ndarray,
) -> np.ndarray:
    """The same in numpy, one array operation at a time as in the demo of arXiv 2601.07372: the peer of the benchmark.

    ``out`` is int64 ``[b, s, orders * heads]`` and ``scratch`` int64 ``[2, b, s]``; both are overwritten.
    """
    orders, heads = primes.shape
    mix, earlier = scratch
    np.multiply(tokens, multipliers[0], out=mix)
    for back in range(1, orders + 1):
        earlier.fill(pad_id)
        np.copyto(earlier[:, back:], tokens[:, :-back], where=documents[:, :-back] == documents[:, back:])
        earlier *= multipliers[back]
        np.bitwise_xor(mix, earlier, out=mix)
        for column in range((back - 1) * heads, back * heads):
            np.remainder(mix, primes.flat[column], out=out[:, :, column])
    out += offsets
    return out
