"""The definition of the n-gram hash, one position at a time."""

from __future__ import annotations

import numpy as np


def ngram_hash_reference(
    tokens: np.ndarray,
    document_ids: np.ndarray,
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
                blocked = blocked or back < 0 or document_ids[sequence, back] != document_ids[sequence, position]
                token = pad_id if blocked else int(tokens[sequence, back])
                mix ^= token * int(multipliers[order + 1])
                for head in range(heads):
                    column = order * heads + head
                    rows[sequence, position - context, column] = mix % int(primes[order, head]) + int(offsets[column])
    return rows
