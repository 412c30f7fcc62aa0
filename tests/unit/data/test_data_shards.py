"""Shards: Megatron-LM's format, and damage that is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megamem.errors import DataError
from megamem_data.shards import Shard, ShardInfo, ShardWriter, token_dtype

LENGTHS = np.array([3, 1, 7, 2, 9, 4])


@pytest.fixture
def written(tmp_path: Path) -> list[ShardInfo]:
    writer = ShardWriter(tmp_path, dtype=np.uint16, shard_tokens=10)
    writer.add(np.arange(11, dtype=np.uint16), LENGTHS[:3])
    writer.add(np.arange(11, 26, dtype=np.uint16), LENGTHS[3:])
    return writer.close()


def test_megatron_reads_what_was_written(tmp_path: Path, written: list[ShardInfo]) -> None:
    assert [(info.name, info.documents, info.tokens) for info in written] == [
        ("shard_00000", 3, 11),
        ("shard_00001", 2, 11),
        ("shard_00002", 1, 4),
    ]
    datasets = [IndexedDataset(str(tmp_path / info.name)) for info in written]
    documents = [document.tolist() for dataset in datasets for document in dataset]
    assert documents == [part.tolist() for part in np.split(np.arange(26), np.cumsum(LENGTHS)[:-1])]
    assert all(list(dataset.document_indices) == list(range(len(dataset) + 1)) for dataset in datasets)


def test_shards_map_the_files(tmp_path: Path, written: list[ShardInfo]) -> None:
    shards = [Shard(tmp_path, info, np.uint16) for info in written]
    assert np.array_equal(np.concatenate([shard.tokens for shard in shards]), np.arange(26))
    assert np.array_equal(np.concatenate([shard.lengths for shard in shards]), LENGTHS)
    assert not shards[0].tokens.flags.owndata and not shards[0].tokens.flags.writeable


def test_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    assert token_dtype(65_499) is np.uint16 and token_dtype(65_500) is np.int32
    writer = ShardWriter(tmp_path, dtype=np.int32, shard_tokens=10)
    writer.add(np.array([70_000, 1], dtype=np.int32), np.array([2]))
    (info,) = writer.close()
    assert Shard(tmp_path, info, np.int32).tokens.tolist() == [70_000, 1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of megatron's half-built dataset
def test_damaged_headers_are_named(tmp_path: Path, written: list[ShardInfo]) -> None:
    index = tmp_path / "shard_00000.idx"
    good = index.read_bytes()
    for bad in (b"XXIDIDX\0\0" + good[9:], good[:9] + b"\x07" + good[10:], good[:17] + b"\x63" + good[18:]):
        index.write_bytes(bad)
        with pytest.raises(DataError, match=r"shard_00000\.idx is damaged"):
            Shard(tmp_path, written[0], np.uint16)
    index.write_bytes(good)
    with pytest.raises(DataError, match="does not describe the shard"):
        Shard(tmp_path, ShardInfo(name="shard_00000", documents=3, tokens=12), np.uint16)
    with pytest.raises(DataError, match="does not describe the shard"):
        Shard(tmp_path, written[0], np.int32)
