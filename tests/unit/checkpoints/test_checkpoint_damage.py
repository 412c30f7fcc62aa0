"""Damaged, newer or foreign checkpoints: one clear error, and nothing loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamem.errors import CheckpointError
from megamem_checkpoints import dense
from megamem_checkpoints import manifest as manifests
from megamem_checkpoints.reader import CheckpointReader
from megamem_kernels.formats import Field

FILES = ("dense/shard-00001-", "tables/decoder.layers.1.engram.table/", "rng/rank_00000", "manifest.json")


def find(path: Path, prefix: str) -> Path:
    return next(file for file in sorted(path.rglob("*")) if file.relative_to(path).as_posix().startswith(prefix))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2 if file.suffix != ".json" else content.index(b'"step": ') + 8] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
@pytest.mark.parametrize("prefix", FILES)
def test_damage_is_named_and_nothing_is_loaded(
    mini_run: Callable[..., Any], prefix: str, damage: Callable[[Path], None]
) -> None:
    saved, fresh = mini_run(seed=1), mini_run(seed=2)
    path, before = saved.save(1), fresh.tensors()
    file = find(path, prefix)
    damage(file)
    with pytest.raises(CheckpointError, match=file.name):
        fresh.load(path)
    assert fresh.equals(before)
    with pytest.raises(CheckpointError, match=file.name):
        CheckpointReader(path).verify()


def test_without_verification_a_flipped_bit_passes(mini_run: Callable[..., Any]) -> None:
    saved, fresh = mini_run(seed=1), mini_run(seed=2)
    path = saved.save(1)
    flip_bit(find(path, FILES[1]))
    fresh.load(path, verify=False)
    assert not fresh.equals(saved.tensors())


def test_damage_of_the_latest_falls_back_to_the_one_before(mini_run: Callable[..., Any]) -> None:
    run = mini_run()
    first, second = run.save(1), run.save(2)
    assert run.checkpointer.latest() == second
    truncate(find(second, FILES[0]))
    assert run.checkpointer.latest() == first
    truncate(find(first, FILES[3]))
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left in .*; delete it to start again"):
        run.checkpointer.latest()


@pytest.mark.parametrize("text", ["", "step_00000009\n", "../../etc\n", "\x00\x01"])
def test_damaged_latest_file_falls_back_to_the_newest(mini_run: Callable[..., Any], text: str) -> None:
    run = mini_run()
    run.save(1)
    second = run.save(2)
    (second.parent / "latest").write_text(text)
    assert run.checkpointer.latest() == second


def test_latest_file_decides(mini_run: Callable[..., Any]) -> None:
    run = mini_run()
    assert run.checkpointer.latest() is None
    first = run.save(1)
    run.save(2)
    (first.parent / "latest").write_text("step_00000001\n")
    assert run.checkpointer.latest() == first


def test_newer_format_is_refused_and_never_skipped(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mini_run()
    run.save(1)
    with monkeypatch.context() as patch:
        patch.setattr("megamem_checkpoints.save.FORMAT_VERSION", manifests.FORMAT_VERSION + 1)
        path = run.save(2)
    for action in (run.checkpointer.latest, lambda: run.load(path)):
        with pytest.raises(CheckpointError, match=r"format version 4, written by megamem .*; update megamem"):
            action()


def test_manifest_with_a_gap_in_a_table_is_refused(mini_run: Callable[..., Any]) -> None:
    path = mini_run().save(1)
    manifest = manifests.read_manifest(path)
    table = manifest.tables["decoder.layers.1.engram.table"]
    table.files = {name: [start + 1, stop] for name, (start, stop) in table.files.items()}
    (path / "manifest.json").write_text(manifest.dumps())
    with pytest.raises(
        CheckpointError, match=r"position 0 of table decoder.layers.1.engram.table is not stored exactly once"
    ):
        CheckpointReader(path)


def test_manifest_is_plain_json_with_a_checksum(mini_run: Callable[..., Any]) -> None:
    path = mini_run().save(1) / "manifest.json"
    body = json.loads(path.read_text())
    assert body["format_version"] == manifests.FORMAT_VERSION and len(body["manifest_sha256"]) == 64
    body["meta"]["lr"] = 1.0
    path.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=r"its checksum is wrong"):
        CheckpointReader(path.parent)


def test_another_width_names_tensor_shapes_and_setting(mini_run: Callable[..., Any]) -> None:
    path, other = mini_run(seed=1).save(1), mini_run(seed=2, hidden=8)
    before = other.tensors()
    with pytest.raises(
        CheckpointError, match=r"word_embeddings.weight is \[7, 6\] .* and \[7, 8\] .*model.hidden_size"
    ):
        other.load(path)
    assert other.equals(before)


def test_missing_and_unexpected_tensors_are_listed(mini_run: Callable[..., Any]) -> None:
    path, other = mini_run(seed=1).save(1), mini_run(seed=2)
    entry = other.entries.pop()
    other.entries.append(type(entry)("decoder.layers.3.input_layernorm.weight", entry.tensor, entry.rows, None))
    with pytest.raises(CheckpointError, match=r"lacks decoder.layers.3.* and has decoder.final_layernorm.weight which"):
        other.load(path)


def test_missing_table_and_other_row_optimizer(mini_run: Callable[..., Any]) -> None:
    path = mini_run(seed=1).save(1)
    other = mini_run(seed=2, state_fields=(Field("exp_avg", torch.float32, ()), Field("last_step", torch.int32, ())))
    with pytest.raises(CheckpointError, match=r"float32\[4\].* keeps exp_avg float32\[\].*set memory.optimizer.name"):
        other.load(path)
    other.load(path, optimizer_state=False)
    del other.tables["decoder.layers.1.engram.table"]
    with pytest.raises(CheckpointError, match=r"of the memory tables it has decoder.layers.1.engram.table which this"):
        other.load(path)


def test_weights_without_moments_cannot_resume(mini_run: Callable[..., Any]) -> None:
    saved, other = mini_run(seed=1), mini_run(seed=2)
    del saved.states[id(saved.norm)]["exp_avg"], saved.states[id(saved.norm)]["exp_avg_sq"]
    path = saved.save(1)
    with pytest.raises(CheckpointError, match=r"has no optimizer state of decoder.final_layernorm.weight"):
        other.load(path)
    other.load(path, optimizer_state=False)
    assert torch.equal(other.norm, saved.norm)


def test_a_dense_file_that_ends_early_is_what_a_load_with_threads_complains_about(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamem_checkpoints.dense.FILE_BYTES", 300)
    saved, other = mini_run(seed=1), mini_run(seed=2)
    path = saved.save(1)
    assert len(list((path / "dense").glob("*.safetensors"))) > 2
    monkeypatch.setattr("megamem_checkpoints.dense.FILE_BYTES", 2**20)
    reader = CheckpointReader(path, threads=3)
    targets = {name: torch.empty(reader.shape(name)) for name in reader.names()}
    dense.read(reader.dense_reader, targets)
    for name, value in targets.items():
        assert torch.equal(value, reader.tensor(name))
    assert torch.equal(targets["decoder.final_layernorm.weight"], saved.norm)
    for file in (path / "dense").glob("*.safetensors"):
        truncate(file)
    with pytest.raises(CheckpointError, match="SafetensorError"):
        dense.read(reader.dense_reader, targets)
    with pytest.raises(CheckpointError, match=r"bytes long in place of"):
        other.load(path)
