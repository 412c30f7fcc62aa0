"""The n-gram hash: validation and choice of the form."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megamem_kernels.ngram_hash.cpu import LEAST_PRIME, hash_positions, reciprocals
from megamem_kernels.parallel import for_ranges

Array = TypeVar("Array", np.ndarray, Tensor)

_GRAIN_ROWS = 1 << 20


def ngram_hash(
    tokens: Array,
    documents: Array,
    *,
    multipliers: np.ndarray,
    primes: np.ndarray,
    offsets: np.ndarray,
    pad_id: int,
    context: int = 0,
    out: Array | None = None,
) -> Array:
    """Row ids of the suffix n-grams of orders 2, 3, ... that end at each position (arXiv 2601.07372, section 2.2).

    The n-gram of order ``n`` at position ``t`` hashes to ``(x[t] m[0]) ^ (x[t-1] m[1]) ^ ... ^ (x[t-n+1] m[n-1])``,
    taken modulo one prime per head. Look-back that would leave the document, or the array, reads ``pad_id``.

    Args:
        tokens: ``[b, s]`` integer ids (canonical ones where tokens are folded), not negative and small enough that no
            product with a multiplier leaves int64 (not checked). An array or CPU tensor is hashed by compiled CPU code, a
            CUDA tensor by Triton.
        documents: ``[b, s]`` integers of the same kind; each document is one contiguous run.
        multipliers: ``[orders + 1]`` int64, odd; ``multipliers[k]`` belongs to look-back ``k``.
        primes: ``[orders, heads]`` int64 table sizes.
        offsets: ``[orders * heads]`` int64, first row of each head.
        pad_id: The id that stands for missing context.
        context: Leading positions that are looked back on but not hashed themselves.
        out: Where the result goes, C-contiguous int64; a new one without it. Fastest where its memory starts at a multiple
            of 64 bytes, as that of torch tensors does.

    Returns:
        ``[b, s - context, orders * heads]`` int64, ``out`` where it is given: all heads of order 2, then of order 3, and so on.

    Raises:
        ValueError: shapes do not fit each other, ``context`` is not in ``[0, s]``, or ``out`` is not of the stated form.
    """
    orders, heads = primes.shape
    if tokens.ndim != 2 or documents.shape != tokens.shape:
        raise ValueError(f"tokens {tuple(tokens.shape)} and documents {tuple(documents.shape)} are not both [b, s]")
    if multipliers.shape != (orders + 1,) or offsets.shape != (orders * heads,):
        raise ValueError(
            f"primes {primes.shape} do not fit multipliers {multipliers.shape} and offsets {offsets.shape}"
        )
    if not 0 <= context <= tokens.shape[1]:
        raise ValueError(f"context {context} of {tokens.shape[1]} positions")
    shape = (tokens.shape[0], tokens.shape[1] - context, orders * heads)
    constants = (multipliers, primes, offsets)
    if isinstance(tokens, Tensor):
        rows = torch.empty(shape, dtype=torch.int64, device=tokens.device) if out is None else out
        if rows.shape != shape or rows.dtype != torch.int64 or not rows.is_contiguous():
            raise ValueError(f"out is {rows.dtype} {tuple(rows.shape)}; it must be contiguous int64 {shape}")
        if tokens.is_cuda:
            from megamem_kernels.ngram_hash.triton import hash_positions_triton

            with torch.cuda.device(tokens.device):
                hash_positions_triton(tokens, documents, *constants, pad_id, context, rows)
        else:
            _hash_cpu(tokens.numpy(), documents.numpy(), *constants, pad_id, context, rows.numpy())
        return rows
    # torch aligns memory to cache lines and numpy to 16 bytes; vector stores that cross lines cost a third of the speed.
    result = torch.empty(shape, dtype=torch.int64).numpy() if out is None else out
    if result.shape != shape or result.dtype != np.int64 or not result.flags.c_contiguous:
        raise ValueError(f"out is {result.dtype} {result.shape}; it must be C-contiguous int64 {shape}")
    _hash_cpu(tokens, documents, *constants, pad_id, context, result)
    return result


def _hash_cpu(
    tokens: np.ndarray,
    documents: np.ndarray,
    multipliers: np.ndarray,
    primes: np.ndarray,
    offsets: np.ndarray,
    pad_id: int,
    context: int,
    rows: np.ndarray,
) -> None:
    heads = primes.shape[1]
    arguments = (
        np.ascontiguousarray(tokens, dtype=np.int64),
        np.ascontiguousarray(documents, dtype=np.int32 if documents.dtype == np.int32 else np.int64),
        np.ascontiguousarray(multipliers, dtype=np.int64),
        *_constants(
            primes.astype(np.int64, copy=False).tobytes(), offsets.astype(np.int64, copy=False).tobytes(), heads
        ),
        int(pad_id),
        context,
        heads,
    )
    flat = rows.reshape(-1)
    grain = max(1, _GRAIN_ROWS // max(1, primes.size))
    for_ranges(
        lambda low, high: hash_positions(*arguments, flat, low, high), rows.shape[0] * rows.shape[1], grain=grain
    )


@lru_cache(maxsize=256)
def _constants(primes: bytes, offsets: bytes, heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Primes, reciprocals and offsets of one layer in aligned memory, and how many heads are taken eight at a time.

    Kept between calls: making them takes a tenth of the time of hashing 16k tokens.
    """
    sizes = np.frombuffer(primes, dtype=np.int64)
    constants = torch.empty(3, sizes.size, dtype=torch.int64).numpy()
    inverse = constants[1].view(np.float64)
    constants[0], inverse[:], constants[2] = sizes, reciprocals(sizes), np.frombuffer(offsets, dtype=np.int64)
    vectors = heads // 8 * 8 if sizes.min(initial=LEAST_PRIME) >= LEAST_PRIME else 0
    return constants[0], inverse, constants[2], vectors
