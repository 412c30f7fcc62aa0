"""Order and packing: pure functions, no files."""

from __future__ import annotations

import numpy as np
import pytest

from megamem.errors import ConfigError
from megamem_data.order import BatchSlice, derive_key, held_out, permute, window_of_sample
from megamem_data.packing import TokenStream, pack


def test_permutation_is_a_bijection_of_every_small_size() -> None:
    for size in range(1, 201):
        assert sorted(permute(np.arange(size), size, key=size)) == list(range(size))


def test_permutation_of_a_large_size_is_a_bijection_without_order() -> None:
    size = 100_003
    images = permute(np.arange(size), size, key=7)
    assert np.array_equal(np.sort(images), np.arange(size))
    assert abs(np.abs(images - np.arange(size)).mean() / size - 1 / 3) < 0.01  # of a uniform permutation
    assert (np.abs(np.diff(images)) == 1).sum() < 20
    assert permute(np.array([2**40]), 2**40 + 9, key=7)[0] < 2**40 + 9


def test_keys_and_epochs_give_other_permutations() -> None:
    assert derive_key("epoch", 1, 23) != derive_key("epoch", 12, 3)
    samples = np.arange(2 * 97)
    windows = window_of_sample(samples, 97, seed=5)
    first, second = windows[:97], windows[97:]
    assert sorted(first) == sorted(second) == list(range(97))
    assert (first == second).mean() < 0.1
    assert (first == window_of_sample(samples[:97], 97, seed=6)).mean() < 0.1
    assert np.array_equal(window_of_sample(samples, 97, seed=None), samples % 97)


def test_every_layout_reads_the_same_samples() -> None:
    for dp_size in (1, 2, 4):
        for micro_batch_size in (1, 2):
            ids = [BatchSlice(8, micro_batch_size, rank, dp_size).samples(3) for rank in range(dp_size)]
            assert all(part.shape == (8 // dp_size // micro_batch_size, micro_batch_size) for part in ids)
            assert sorted(np.concatenate([part.ravel() for part in ids])) == list(range(24, 32))
    with pytest.raises(ConfigError, match="multiple of 6"):
        BatchSlice(8, 2, 0, 3)


def test_validation_split_is_a_hash_of_the_number() -> None:
    chosen = held_out(20_000, 0.1, seed=3)
    assert abs(chosen.mean() - 0.1) < 0.01
    assert np.array_equal(chosen[:500], held_out(500, 0.1, seed=3))
    assert not np.array_equal(chosen, held_out(20_000, 0.1, seed=4))
    assert not held_out(1000, 0.0, seed=3).any()


def make_stream(chosen_share: float = 0.7) -> tuple[TokenStream, np.ndarray, list[np.ndarray]]:
    """Three shards of odd documents whose tokens number the whole data, so that each token tells where it came from."""
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 12, size=n) for n in (5, 1, 17)]
    documents = np.split(np.arange(sum(map(sum, lengths))), np.cumsum(np.concatenate(lengths))[:-1])
    shards = np.split(np.concatenate(documents), np.cumsum([part.sum() for part in lengths])[:-1])
    chosen = rng.random(len(documents)) < chosen_share
    return TokenStream(shards, lengths, chosen), chosen, documents


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_stream_is_its_documents_end_to_end(share: float) -> None:
    stream, chosen, documents = make_stream(share)
    expected = np.concatenate([document for document, keep in zip(documents, chosen, strict=True) if keep])
    assert len(stream) == len(expected)
    for start in range(0, len(stream) - 7, 3):
        out = np.empty(7, dtype=np.int64)
        stream.read(start, out)
        assert np.array_equal(out, expected[start : start + 7])


def test_windows_cover_each_token_once() -> None:
    stream, _, _ = make_stream()
    for seq_length in (1, 4, 7, len(stream) - 1):
        windows = stream.windows(seq_length)
        assert windows == (len(stream) - 1) // seq_length
        micro = pack(stream, np.arange(windows), np.arange(windows), seq_length, np.zeros((23, 0), dtype=np.int64))
        whole = np.empty(windows * seq_length + 1, dtype=np.int64)
        stream.read(0, whole)
        assert np.array_equal(micro.tokens.ravel(), whole[:-1])
        assert np.array_equal(micro.labels.ravel(), whole[1:])
    assert stream.windows(len(stream)) == 0


def test_documents_of_a_micro_batch() -> None:
    stream, _, documents = make_stream()
    owner = np.concatenate([np.full(len(document), number) for number, document in enumerate(documents)])
    paths = np.stack([np.arange(23), np.arange(23) * 10], axis=1)
    order = np.array([3, 0, 5])
    micro = pack(stream, order, np.array([70, 71, 72]), 9, paths)
    assert micro.shape == (3, 9)
    assert np.array_equal(micro.sample_ids, [70, 71, 72])
    assert micro.document_ids.dtype == np.int32 and micro.loss_mask.dtype == np.float32
    # The mask is 1 exactly where the label belongs to the same document as the input.
    assert np.array_equal(micro.loss_mask == 1, owner[micro.tokens] == owner[micro.labels])
    assert 0 < micro.loss_mask.mean() < 1
    # Numbers rise by one at every change of document and at every new sequence, and lead to the document's path.
    numbers = micro.document_ids.ravel()
    changes = np.diff(owner[micro.tokens.ravel()]) != 0
    changes[8::9] = True
    assert numbers[0] == 0 and np.array_equal(np.diff(numbers), changes.astype(int))
    assert micro.document_paths.shape == (numbers[-1] + 1, 2)
    assert np.array_equal(micro.document_paths[micro.document_ids][..., 0], owner[micro.tokens])
