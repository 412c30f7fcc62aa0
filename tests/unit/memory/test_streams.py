"""Streams: addresses of Engram layers and bank levels from the data of a micro-batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megamem.batch import MicroBatch
from megamem.errors import ConfigError, DataError
from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.memory.names import bank_table_name
from megamem.memory.streams import Stream, build_streams
from megamem.models.config import ModelConfig

MODEL = ModelConfig(num_layers=4, hidden_size=12, num_attention_heads=2, num_query_groups=1, vocab_size=100)
ENGRAM = EngramConfig(layers=[3, 1], heads=2, width=5, rows_per_head=50)
BANK = BankConfig(units=[4, 0, 2], branching=3, generic_probability=0.25)
MEMORY = MemoryConfig(engram=ENGRAM, bank=BANK)


def streams_of(memory: MemoryConfig = MEMORY, layers: range = range(4), **overrides) -> dict[str, Stream]:
    arguments = {"eos_id": 2, "fold": None, "seed": 7} | overrides
    return {s.name: s for s in build_streams(MODEL, memory, layers=layers, **arguments)}


def micro_batch(sample_ids: list[int], lengths: list[list[int]], levels: int = 3, branching: int = 3) -> MicroBatch:
    """Sequences of documents of the given lengths; tokens and paths are functions of (sample, position or document)."""
    tokens, document_ids, paths, count = [], [], [], 0
    for sample, documents in zip(sample_ids, lengths, strict=True):
        rng = np.random.default_rng(sample)
        tokens.append(rng.integers(0, MODEL.vocab_size, sum(documents)))
        document_ids.append(np.repeat(np.arange(count, count + len(documents)), documents))
        count += len(documents)
        leaves = rng.integers(0, branching**levels, len(documents))
        paths.append(np.stack([leaves // branching ** (levels - 1 - level) for level in range(levels)], axis=1))
    ids = np.stack(tokens)
    return MicroBatch(
        sample_ids=np.array(sample_ids),
        tokens=ids,
        labels=np.roll(ids, -1, axis=1),
        loss_mask=np.ones(ids.shape, dtype=np.float32),
        document_ids=np.stack(document_ids).astype(np.int32),
        document_paths=np.concatenate(paths),
    )


MICRO = micro_batch([11, 4], [[3, 1, 5], [2, 7]])


def test_names_tables_and_initialisation() -> None:
    streams = streams_of()
    assert list(streams) == ["decoder.layers.1.engram", "decoder.layers.3.engram", "bank.level1", "bank.level3"]
    table = streams["decoder.layers.1.engram"].tables[0]
    assert (table.name, table.width) == ("decoder.layers.1.engram.table", 5)
    assert table.rows == streams["decoder.layers.1.engram"].rows
    bank = streams["bank.level3"]
    assert bank.rows == 3**3 + 1
    assert [t.name for t in bank.tables] == [bank_table_name(layer, 3) for layer in range(4)]
    assert {t.width for t in bank.tables} == {3 * 2 * 12}
    segments = [(s.width, s.std, s.truncated) for s in bank.tables[0].init]
    assert segments == [(2 * 2 * 12, BANK.init_std, True), (2 * 12, 0.0, False)]


def test_a_stage_sees_its_layers_of_the_whole_model() -> None:
    whole, first, second = streams_of(), streams_of(layers=range(0, 2)), streams_of(layers=range(2, 4))
    assert list(first) == ["decoder.layers.1.engram", "bank.level1", "bank.level3"]
    assert list(second) == ["decoder.layers.3.engram", "bank.level1", "bank.level3"]
    for stage in (first, second):
        for name, stream in stage.items():
            np.testing.assert_array_equal(
                stream.addresses(MICRO, slice(0, 9)), whole[name].addresses(MICRO, slice(0, 9))
            )
    assert [t.name for t in second["bank.level1"].tables] == [bank_table_name(layer, 1) for layer in (2, 3)]


def test_a_stage_without_bank_layers_has_no_bank_streams() -> None:
    memory = MemoryConfig(bank=dataclasses.replace(BANK, layers=[3]))
    assert not streams_of(memory, layers=range(0, 3))
    assert [t.name for t in streams_of(memory)["bank.level1"].tables] == [bank_table_name(3, 1)]


@pytest.mark.parametrize("shards", [1, 2, 3, 9])
def test_slices_of_a_sequence_join_to_the_whole(shards: int) -> None:
    for stream in streams_of().values():
        whole = stream.addresses(MICRO, slice(0, 9))
        assert whole.dtype == np.int64
        assert whole.shape[:2] == (2, 9)
        assert 0 <= whole.min() <= whole.max() < stream.rows
        step = 9 // shards
        parts = [stream.addresses(MICRO, slice(start, start + step)) for start in range(0, 9, step)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_missing_context_reads_pad_id() -> None:
    tokens = micro_batch([0], [[2]])
    by_default = streams_of(eos_id=6)["decoder.layers.1.engram"].addresses(tokens, slice(0, 2))
    named = MemoryConfig(engram=dataclasses.replace(ENGRAM, pad_id=6))
    explicit = streams_of(named, eos_id=2)["decoder.layers.1.engram"].addresses(tokens, slice(0, 2))
    np.testing.assert_array_equal(by_default, explicit)
    assert (explicit != streams_of(eos_id=2)["decoder.layers.1.engram"].addresses(tokens, slice(0, 2))).any()


def test_folded_tokens_hash_alike() -> None:
    fold = np.arange(100) // 2
    folding = MemoryConfig(engram=dataclasses.replace(ENGRAM, fold_tokens=True))
    stream = streams_of(folding, fold=fold)["decoder.layers.1.engram"]
    sibling = dataclasses.replace(MICRO, tokens=MICRO.tokens ^ 1)
    np.testing.assert_array_equal(stream.addresses(MICRO, slice(0, 9)), stream.addresses(sibling, slice(0, 9)))
    raw = streams_of(fold=fold)["decoder.layers.1.engram"]  # fold_tokens is off: the lookup is not used
    assert (raw.addresses(MICRO, slice(0, 9)) != raw.addresses(sibling, slice(0, 9))).any()
    with pytest.raises(ValueError, match="100 entries"):
        streams_of(folding, fold=None)


def test_bank_reads_the_block_of_the_document() -> None:
    streams = streams_of()
    level1, level3 = (
        streams[n].addresses(MICRO, slice(0, 9), train=False)[..., 0] for n in ("bank.level1", "bank.level3")
    )
    np.testing.assert_array_equal(level3, MICRO.document_paths[:, 2][MICRO.document_ids])
    np.testing.assert_array_equal(level3 // 3**2, level1)  # prefix property


def test_generic_block_is_drawn_once_for_all_levels() -> None:
    micro = micro_batch(list(range(200)), [[1, 2, 1]] * 200)
    streams = streams_of()
    level1, level3 = (streams[n].addresses(micro, slice(0, 4))[..., 0] for n in ("bank.level1", "bank.level3"))
    generic = level3 == 27
    np.testing.assert_array_equal(generic, level1 == 3)
    np.testing.assert_array_equal(generic[:, 1], generic[:, 2])  # one draw for a whole document
    assert 0 < generic.mean() < 1
    np.testing.assert_array_equal(level3[~generic], micro.document_paths[:, 2][micro.document_ids][~generic])


def test_generic_share_is_the_probability() -> None:
    micro = micro_batch(list(range(3000)), [[1, 1]] * 3000)
    for probability in (0.0, 1 / 17, 0.5, 1.0):
        memory = MemoryConfig(bank=dataclasses.replace(BANK, generic_probability=probability))
        generic = streams_of(memory)["bank.level1"].addresses(micro, slice(0, 2)) == 3
        assert generic.mean() == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 6000) ** 0.5)


def test_generic_draw_depends_on_the_sample_not_on_the_batch() -> None:
    lengths = {i: [1 + i % 3, 2, 6 - i % 3] for i in range(40)}
    stream = streams_of()["bank.level3"]
    alone = {i: stream.addresses(micro_batch([i], [lengths[i]]), slice(0, 9))[0] for i in lengths}
    order = list(np.random.default_rng(0).permutation(40))
    for batch in (order[:7], order[7:39], order[39:]):
        together = stream.addresses(micro_batch(batch, [lengths[i] for i in batch]), slice(0, 9))
        for row, sample in zip(together, batch, strict=True):
            np.testing.assert_array_equal(row, alone[sample])
    other = streams_of(seed=8)["bank.level3"]
    assert any((other.addresses(micro_batch([i], [lengths[i]]), slice(0, 9))[0] != alone[i]).any() for i in lengths)


def test_data_without_the_right_tree_is_refused() -> None:
    shallow = micro_batch([1], [[4]], levels=2)
    assert streams_of()["bank.level1"].addresses(shallow, slice(0, 4)).shape == (1, 4, 1)
    with pytest.raises(DataError, match="megamem data prepare"):
        streams_of()["bank.level3"].addresses(shallow, slice(0, 4))
    wider = micro_batch(list(range(8)), [[4]] * 8, branching=9)
    with pytest.raises(DataError, match=r"memory\.bank\.branching=3"):
        streams_of()["bank.level1"].addresses(wider, slice(0, 4))


def test_pad_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="pad_id is 100; set a token id from 0 to 99"):
        streams_of(MemoryConfig(engram=EngramConfig(layers=[0], pad_id=100)))
