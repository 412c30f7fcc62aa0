"""The n-gram hash against the published vectors, its definition, and the properties that training relies on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megamem.memory.config import EngramConfig
from megamem.memory.hashing import HashSpec, hash_specs, is_prime
from megamem_kernels.ngram_hash import ngram_hash
from megamem_kernels.ngram_hash.reference import ngram_hash_reference

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "engram_hash_testvectors.json").read_text())
HASHES = pytest.mark.parametrize("hash_function", [ngram_hash, ngram_hash_reference])
PAD = 3


def spec(orders: int = 3, heads: int = 4, rows: int = 101, vocab: int = 1000) -> HashSpec:
    config = EngramConfig(layers=[2], orders=list(range(2, 2 + orders)), heads=heads, rows_per_head=rows)
    return hash_specs(config, vocab)[2]


def constants(spec: HashSpec) -> dict[str, np.ndarray]:
    return {"multipliers": spec.multipliers, "primes": spec.primes, "offsets": spec.offsets}


def packed(rng: np.random.Generator, batch: int, length: int, vocab: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in documents of one to a few positions, numbered over the batch."""
    starts = rng.random((batch, length)) < 0.3
    starts[:, 0] = True
    return rng.integers(0, vocab, (batch, length)), (np.cumsum(starts).reshape(batch, length) - 1).astype(np.int32)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"].split()[0])
@HASHES
def test_published_vectors(vector: dict, hash_function) -> None:
    config = EngramConfig(
        layers=vector["layer_ids"],
        orders=vector["orders"],
        heads=vector["heads"],
        rows_per_head=vector["base_rows"][0],
        seed=vector["seed"],
    )
    specs = hash_specs(config, vector["compressed_vocab"])
    assert list(specs) == vector["layer_ids"]
    for layer, expected in vector["layers"].items():
        ours = specs[int(layer)]
        assert ours.primes.tolist() == expected["primes"]
        assert [str(m) for m in ours.multipliers] == expected["multipliers"]
        assert ours.rows == expected["rows_total"]
        tokens = np.array([expected["test_compressed_ids"]])
        rows = hash_function(tokens, np.zeros_like(tokens), **constants(ours), pad_id=vector["pad_compressed_id"])
        assert rows[0].tolist() == expected["global_row_ids"]


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (1, 2), (3, 5), (2, 64)])
@pytest.mark.parametrize("orders", [1, 2, 3])
@pytest.mark.parametrize("context", [0, 1, 4])
def test_fast_form_follows_the_definition(batch: int, length: int, orders: int, context: int) -> None:
    tokens, documents = packed(np.random.default_rng([batch, length, orders]), batch, length)
    context = min(context, length - 1)
    arguments = constants(spec(orders)) | {"pad_id": PAD, "context": context}
    rows = ngram_hash(tokens, documents, **arguments)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, ngram_hash_reference(tokens, documents, **arguments))


def test_largest_ids_stay_inside_int64() -> None:
    vocab = 7  # the fewer ids, the larger the multipliers
    tokens = np.full((1, 6), vocab - 1)
    arguments = constants(spec(vocab=vocab)) | {"pad_id": vocab - 1}
    rows = ngram_hash(tokens, np.zeros_like(tokens), **arguments)
    np.testing.assert_array_equal(rows, ngram_hash_reference(tokens, np.zeros_like(tokens), **arguments))


def test_every_head_stays_in_its_own_range() -> None:
    ours = spec()
    tokens, documents = packed(np.random.default_rng(0), 4, 500)
    rows = ngram_hash(tokens, documents, **constants(ours), pad_id=PAD)
    local = rows - ours.offsets
    assert local.min() >= 0
    assert (local < ours.primes.ravel()).all()
    assert ours.rows == ours.offsets[-1] + ours.primes.flat[-1]


@HASHES
def test_same_ngram_reads_the_same_rows(hash_function) -> None:
    tokens = np.array([[9, 1, 2, 3, 8, 1, 2, 3], [1, 2, 3, 0, 0, 5, 2, 3]])
    documents = np.repeat([[0], [1]], 8, axis=1)
    rows = hash_function(tokens, documents, **constants(spec(orders=2)), pad_id=PAD)
    np.testing.assert_array_equal(rows[0, 3], rows[0, 7])
    np.testing.assert_array_equal(rows[0, 3], rows[1, 2])
    np.testing.assert_array_equal(rows[1, 7, :4], rows[1, 2, :4])  # the 2-gram is the same, the 3-gram is not
    assert (rows[1, 7, 4:] != rows[1, 2, 4:]).any()


@HASHES
def test_missing_context_reads_the_pad_token(hash_function) -> None:
    arguments = constants(spec(orders=2)) | {"pad_id": PAD}
    tokens = np.array([[5, 6, 7]])
    padded = np.array([[PAD, PAD, 5, 6, 7]])
    bare = hash_function(tokens, np.zeros_like(tokens), **arguments)
    np.testing.assert_array_equal(bare, hash_function(padded, np.zeros_like(padded), **arguments)[:, 2:])


@HASHES
def test_packed_documents_hash_as_if_alone(hash_function) -> None:
    arguments = constants(spec()) | {"pad_id": PAD}
    tokens = np.random.default_rng(1).integers(0, 1000, (1, 9))
    documents = np.array([[0, 1, 1, 2, 2, 2, 2, 2, 3]])
    rows = hash_function(tokens, documents, **arguments)
    for start, stop in [(0, 1), (1, 3), (3, 8), (8, 9)]:
        alone = hash_function(tokens[:, start:stop], documents[:, start:stop], **arguments)
        np.testing.assert_array_equal(rows[:, start:stop], alone)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_with_context_equal_the_whole(chunk: int) -> None:
    ours = spec()
    tokens, documents = packed(np.random.default_rng(2), 2, 20)
    arguments = constants(ours) | {"pad_id": PAD}
    chunks = []
    for start in range(0, 20, chunk):
        left = max(0, start - 3)
        window = slice(left, start + chunk)
        chunks.append(ngram_hash(tokens[:, window], documents[:, window], **arguments, context=start - left))
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), ngram_hash(tokens, documents, **arguments))


def test_no_prime_is_used_twice_and_the_layer_order_decides() -> None:
    config = EngramConfig(layers=[5, 1], heads=3, rows_per_head=50)
    specs = hash_specs(config, 1000)
    primes = np.concatenate([specs[layer].primes.ravel() for layer in (5, 1)])
    assert primes.tolist() == [53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103]
    assert hash_specs(EngramConfig(layers=[1], heads=3, rows_per_head=50), 1000)[1].primes[0, 0] == 53
    np.testing.assert_array_equal(
        specs[1].multipliers, hash_specs(EngramConfig(layers=[1]), 1000)[1].multipliers
    )  # the seed, not the position in the list, decides the multipliers
    assert (specs[1].multipliers % 2 == 1).all()


def test_primality() -> None:
    sieve = [n for n in range(2000) if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if is_prime(n)] == sieve
    assert is_prime(2**61 - 1)
    assert is_prime(2**63 - 25)  # the largest prime of int64
    for composite in (
        561,
        3215031751,
        3825123056546413051,
        (2**31 - 1) * (2**31 - 19),
    ):  # strong pseudoprimes and a square-ish
        assert not is_prime(composite)
