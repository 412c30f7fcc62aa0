"""The loader: the same global batch under every layout, any step in any order, resumable and refusing other data."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamem.batch import MicroBatch, StepBatch
from megamem.errors import ConfigError, DataError
from megamem_data.config import DataConfig, SourceConfig, TokenizerConfig
from megamem_data.loader import PackedLoader, build_loader
from megamem_data.prepare import prepare
from megamem_data.prepared import PreparedData


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    data = DataConfig(
        path=str(tmp_path_factory.mktemp("loader") / "data"),
        sources=[SourceConfig(kind="python_stdlib", max_documents=25)],
        tokenizer=TokenizerConfig(vocab_size=600, train_lines=2000),
        validation_fraction=0.2,
        shard_tokens=20_000,
        workers=1,
    )
    return prepare(data, branching=4, levels=2, seed=3, progress=False)


def loader(prepared: PreparedData, **changes: Any) -> PackedLoader:
    options: dict[str, Any] = {
        "split": "train",
        "seq_length": 33,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 11,
        "levels": 2,
    }
    return build_loader(prepared, **(options | changes))


def by_sample(batches: list[StepBatch]) -> dict[int, tuple[bytes, ...]]:
    """What every sample shows: tokens, labels, mask, the path of each token."""
    found: dict[int, tuple[bytes, ...]] = {}
    for batch in batches:
        for micro in batch.micro_batches:
            paths = micro.document_paths[micro.document_ids]
            for row, sample in enumerate(micro.sample_ids.tolist()):
                parts = (micro.tokens[row], micro.labels[row], micro.loss_mask[row], paths[row])
                found[sample] = tuple(part.tobytes() for part in parts)
    return found


def equal(a: StepBatch, b: StepBatch) -> bool:
    names = [field.name for field in dataclasses.fields(MicroBatch)]
    pairs = list(zip(a.micro_batches, b.micro_batches, strict=True))
    return a.step == b.step and all(np.array_equal(getattr(x, n), getattr(y, n)) for x, y in pairs for n in names)


def test_every_layout_sees_the_same_global_batch(prepared: PreparedData) -> None:
    expected: dict[int, tuple[bytes, ...]] = {}
    for dp_size in (1, 2, 4):
        for micro_batch_size in (1, 2):
            ranks = [
                loader(prepared, dp_size=dp_size, dp_rank=rank, micro_batch_size=micro_batch_size)
                for rank in range(dp_size)
            ]
            batches = [rank.batch(5) for rank in ranks]
            assert all(len(batch.micro_batches) == 8 // dp_size // micro_batch_size for batch in batches)
            found = by_sample(batches)
            assert sorted(found) == list(range(40, 48))
            expected = expected or found
            assert found == expected
            for rank in ranks:
                rank.close()


def test_an_epoch_shows_every_window_once_and_the_next_one_in_another_order(prepared: PreparedData) -> None:
    train = loader(prepared, seq_length=1000, global_batch_size=1)
    epochs = [
        [train.batch(epoch * train.windows + i).micro_batches[0].tokens.tobytes() for i in range(train.windows)]
        for epoch in range(2)
    ]
    train.close()
    assert train.windows > 30 and epochs[0] != epochs[1]
    whole = np.empty(train.windows * 1000, dtype=np.int64)
    prepared.stream("train").read(0, whole)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(part.tobytes() for part in whole.reshape(-1, 1000))


def test_steps_are_independent_of_what_was_read_before(prepared: PreparedData) -> None:
    one, two = loader(prepared, micro_batch_size=2), loader(prepared, micro_batch_size=2)
    in_order = [one.batch(step) for step in range(6)]
    assert equal(two.batch(5), in_order[5]) and equal(two.batch(0), in_order[0]) and equal(two.batch(1), in_order[1])
    assert not equal(in_order[0], in_order[1])
    other = loader(prepared, seed=12, micro_batch_size=2)
    assert not equal(other.batch(0), in_order[0])
    for each in (one, two, other):
        each.close()


def test_contract_of_a_micro_batch(prepared: PreparedData) -> None:
    train = loader(prepared, micro_batch_size=4, seq_length=301)
    for micro in train.batch(2).micro_batches:
        assert micro.shape == (4, 301)
        assert (
            micro.tokens.dtype == micro.labels.dtype == micro.sample_ids.dtype == micro.document_paths.dtype == np.int64
        )
        assert np.array_equal(micro.tokens[:, 1:], micro.labels[:, :-1])
        # A label is left out where the input closes its document, nowhere else.
        assert np.array_equal(micro.loss_mask == 0, micro.tokens == prepared.eos_id)
        assert np.array_equal(np.unique(micro.document_ids), np.arange(len(micro.document_paths)))
        assert (np.diff(micro.document_ids[:, [0, -1]].ravel()) >= 0).all()
        assert len(set(micro.document_ids[:, 0])) == 4
    train.close()
    shallow, flat = loader(prepared, levels=1), loader(prepared, levels=0)
    assert shallow.batch(0).micro_batches[0].document_paths.shape[1] == 1
    assert flat.batch(0).micro_batches[0].document_paths.shape[1] == 0
    shallow.close()
    flat.close()


def test_validation_keeps_its_order_and_wraps(prepared: PreparedData) -> None:
    windows = loader(prepared, split="validation", seq_length=64).windows
    validation = loader(prepared, split="validation", seq_length=64, global_batch_size=windows, seed=1)
    other_seed = loader(prepared, split="validation", seq_length=64, global_batch_size=windows, seed=2)
    first, second = validation.batch(0), validation.batch(1)
    tokens = np.concatenate([micro.tokens for micro in first.micro_batches])
    expected = np.empty(windows * 64, dtype=np.int64)
    prepared.stream("validation").read(0, expected)
    assert np.array_equal(tokens.ravel(), expected)
    assert np.array_equal(tokens, np.concatenate([micro.tokens for micro in second.micro_batches]))
    assert equal(other_seed.batch(0), first)
    validation.close()
    other_seed.close()


def test_state_names_what_changed(prepared: PreparedData) -> None:
    train = loader(prepared)
    train.batch(6)
    state = train.state_dict()
    assert (state["steps"], state["samples"]) == (7, 56)
    resumed = loader(prepared, dp_size=4, dp_rank=3, micro_batch_size=2)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for changes, message in (
        ({"seed": 12}, "train.seed was 11 and is 12"),
        ({"seq_length": 32}, "data.seq_length was 33 and is 32"),
        ({"global_batch_size": 16}, "train.global_batch_size was 8 and is 16"),
        ({"split": "validation"}, "split was train and is validation"),
    ):
        with pytest.raises(DataError, match=message):
            loader(prepared, **changes).load_state_dict(state)
    with pytest.raises(DataError, match=r"the fingerprint of .* was other"):
        train.load_state_dict(state | {"data": "other"})
    train.close()
    resumed.close()


def test_impossible_requests_name_the_setting(prepared: PreparedData) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=8 is not a multiple"):
        loader(prepared, micro_batch_size=3)
    with pytest.raises(DataError, match=r"memory\.bank\.units asks for 3 levels"):
        loader(prepared, levels=3)
    with pytest.raises(DataError, match=r"validation split .* raise data\.validation_fraction"):
        loader(prepared, split="validation", seq_length=10_000_000)
    with pytest.raises(DataError, match=r"train split .* lower data\.seq_length"):
        loader(prepared, seq_length=10_000_000)


def test_damage_found_by_the_thread_reaches_the_caller_and_close_ends_the_thread(
    prepared: PreparedData, tmp_path: Path
) -> None:
    for file in prepared.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "shard_00000.bin").open("r+b") as shard:
        shard.write(b"\xff\xff" * prepared.manifest.shards[0]["tokens"])
    damaged = loader(PreparedData.open(tmp_path), global_batch_size=1, seq_length=2000, levels=0)
    with pytest.raises(DataError, match="holds the token id 65535"):
        for step in range(damaged.windows):
            damaged.batch(step)
    damaged.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megamem-loader")]
    with pytest.raises(RuntimeError, match="shutdown"):
        damaged.batch(0)
