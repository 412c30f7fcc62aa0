"""The compiled n-gram hash: exact remainders at the edge of int64, every cut into ranges, and the Triton form."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch

from megamem_kernels.ngram_hash import op
from megamem_kernels.ngram_hash.op import ngram_hash
from megamem_kernels.ngram_hash.reference import ngram_hash_reference, ngram_hash_vectorized
from megamem_kernels.parallel import set_threads

VOCABULARY = 1000


def constants(rng: np.random.Generator, orders: int, heads: int, *, least: int = 1 << 20) -> dict[str, np.ndarray]:
    primes = rng.integers(least, 2 * least, (orders, heads))
    sizes = primes.ravel()
    multipliers = 2 * rng.integers(0, (2**63 - 1) // VOCABULARY // 2, orders + 1) + 1
    return {"multipliers": multipliers, "primes": primes, "offsets": np.cumsum(sizes) - sizes}


def packed(rng: np.random.Generator, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    starts = rng.random((batch, length)) < 0.2
    starts[:, :1] = True
    return rng.integers(0, VOCABULARY, (batch, length)), np.cumsum(starts).reshape(batch, length) - 1


@pytest.mark.parametrize(("batch", "length", "context"), [(0, 5, 0), (1, 1, 0), (2, 7, 7), (3, 33, 2), (2, 600, 1)])
@pytest.mark.parametrize(("orders", "heads"), [(1, 1), (2, 8), (3, 7), (2, 16), (4, 9)])
def test_every_shape_follows_the_definition(batch: int, length: int, context: int, orders: int, heads: int) -> None:
    rng = np.random.default_rng([batch, length, orders, heads])
    tokens, documents = packed(rng, batch, length)
    arguments = constants(rng, orders, heads) | {"pad_id": 3, "context": context}
    out = np.full((batch, length - context, orders * heads), -1, dtype=np.int64)
    assert ngram_hash(tokens, documents, **arguments, out=out) is out
    np.testing.assert_array_equal(out, ngram_hash_reference(tokens, documents, **arguments))


@pytest.mark.parametrize("bits", [2, 7, 13, 14, 15, 20, 31, 32, 40, 62])
def test_remainders_are_exact_up_to_the_largest_int64(bits: int) -> None:
    """Hashes of any size (the multiplier of a token is 1), many of them a multiple of a prime, or one more or less."""
    rng = np.random.default_rng(bits)
    primes = rng.integers(1 << bits - 1, 1 << bits, 8, endpoint=True)
    primes[:2] = (1 << bits - 1, 1 << bits)
    mixes = np.concatenate([rng.integers(2**62, 2**63 - 1, 500, endpoint=True), 2**63 - 1 - np.arange(500)])
    multiples = (mixes[:, None] // primes * primes).ravel()
    tokens = np.concatenate([mixes, multiples, multiples - 1, multiples - primes[-1] + 1, [0, 1, 2**53 + 1]])
    tokens = tokens[tokens >= 0]
    arguments = {"multipliers": np.array([1, 1]), "primes": primes[None], "offsets": np.zeros(8, dtype=np.int64)}
    rows = ngram_hash(tokens[None], np.arange(tokens.size)[None], **arguments, pad_id=0)
    np.testing.assert_array_equal(rows[0], tokens[:, None] % primes)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16])
def test_threads_cuts_and_dtypes_change_nothing(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    tokens, documents = packed(rng, 5, 301)
    arguments = constants(rng, 2, 8) | {"pad_id": 3, "context": 1}
    expected = ngram_hash(tokens, documents, **arguments)
    monkeypatch.setattr(op, "_GRAIN_ROWS", 16)
    try:
        for count in (1, 3):
            set_threads(count)
            rows = ngram_hash(tokens.astype(np.int32), documents.astype(dtype), **arguments)
            np.testing.assert_array_equal(rows, expected)
    finally:
        set_threads(0)
    strided = ngram_hash(np.repeat(tokens, 2, axis=1)[:, ::2], np.repeat(documents, 2, axis=1)[:, ::2], **arguments)
    np.testing.assert_array_equal(strided, expected)
    tensors = ngram_hash(torch.from_numpy(tokens), torch.from_numpy(documents), **arguments)
    np.testing.assert_array_equal(tensors.numpy(), expected)


def test_ids_beyond_int32_and_the_alignment_of_a_new_result() -> None:
    rng = np.random.default_rng(6)
    tokens, documents = packed(rng, 2, 50)
    arguments = constants(rng, 2, 8, least=1 << 34) | {"pad_id": 3}
    rows = ngram_hash(tokens, documents, **arguments)
    np.testing.assert_array_equal(rows, ngram_hash_reference(tokens, documents, **arguments))
    assert rows.max() > 2**37
    assert rows.ctypes.data % 64 == 0


def test_the_benchmark_peer_is_the_same_hash() -> None:
    rng = np.random.default_rng(7)
    tokens, documents = packed(rng, 2, 50)
    arguments = constants(rng, 3, 4) | {"pad_id": 3}
    out, scratch = np.empty((2, 50, 12), dtype=np.int64), np.empty((2, 2, 50), dtype=np.int64)
    ngram_hash_vectorized(tokens, documents, **arguments, out=out, scratch=scratch)
    np.testing.assert_array_equal(out, ngram_hash_reference(tokens, documents, **arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": np.zeros((2, 4), dtype=np.int64)}, "not both"),
        ({"multipliers": np.ones(2, dtype=np.int64)}, "do not fit"),
        ({"offsets": np.zeros(3, dtype=np.int64)}, "do not fit"),
        ({"context": 6}, "context 6 of 5"),
        ({"context": -1}, "context -1 of 5"),
        ({"out": np.empty((2, 5, 15), dtype=np.int64)}, "must be C-contiguous"),
        ({"out": np.empty((2, 5, 16), dtype=np.int32)}, "must be C-contiguous"),
        ({"out": np.empty((2, 5, 32), dtype=np.int64)[:, :, ::2]}, "must be C-contiguous"),
    ],
)
def test_misfits_are_refused(change: dict[str, object], message: str) -> None:
    zeros = np.zeros((2, 5), dtype=np.int64)
    arguments: dict = {"tokens": zeros, "documents": zeros, "pad_id": 0} | constants(np.random.default_rng(0), 2, 8)
    with pytest.raises(ValueError, match=message):
        ngram_hash(**(arguments | change))


@pytest.mark.parametrize(("batch", "length", "context"), [(1, 1, 0), (3, 33, 2), (2, 150, 1), (2, 4, 4)])
@pytest.mark.parametrize(("orders", "heads"), [(1, 1), (2, 8), (3, 5)])
def test_triton_form_follows_the_definition(batch: int, length: int, context: int, orders: int, heads: int) -> None:
    from megamem_kernels.ngram_hash.triton import hash_positions_triton

    rng = np.random.default_rng([batch, length, orders])
    tokens, documents = packed(rng, batch, length)
    c = constants(rng, orders, heads, least=1 << 33)
    rows = torch.full((batch, length - context, orders * heads), -1)
    hash_positions_triton(
        torch.from_numpy(tokens),
        torch.from_numpy(documents),
        c["multipliers"],
        c["primes"],
        c["offsets"],
        3,
        context,
        rows,
    )
    expected = ngram_hash_reference(tokens, documents, **c, pad_id=3, context=context)
    np.testing.assert_array_equal(rows.numpy(), expected)
