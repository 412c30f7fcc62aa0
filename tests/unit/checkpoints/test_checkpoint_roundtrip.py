"""What is written is what is read, without unpickling, and by the reader that needs no run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamem.config.base import to_dict
from megamem.errors import CheckpointError
from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.models.config import ModelConfig, MoEConfig
from megamem_checkpoints import dense, owned
from megamem_checkpoints.compare import compare_models
from megamem_checkpoints.directory import find_checkpoint
from megamem_checkpoints.reader import CheckpointReader

ENGRAM = "decoder.layers.1.engram.table"
BANK = "decoder.layers.0.bank.level1.table"


def test_whoever_may_read_the_folder_may_read_every_file(mini_run: Callable[..., Any]) -> None:
    path = mini_run().save(1)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 4
    assert {file.stat().st_mode & 0o777 for file in files} == {path.stat().st_mode & 0o666}


def test_round_trip_is_bit_identical(mini_run: Callable[..., Any]) -> None:
    saved, fresh = mini_run(seed=1), mini_run(seed=2)
    path = saved.save(50)
    torch_state = torch.get_rng_state()
    torch.rand(3)
    assert not fresh.equals(saved.tensors())

    loaded = fresh.load(path)

    assert fresh.equals(saved.tensors())
    assert loaded["step"] == 50 and loaded["meta"] == saved.meta
    assert torch.equal(loaded["rng"]["tracker.model-parallel-rng"], saved.rng["tracker.model-parallel-rng"])
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_small_files_and_batches_read_back_the_same(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "FILE_BYTES", 200)
    monkeypatch.setattr(owned, "FILE_BYTES", 300)
    saved, fresh = mini_run(seed=1), mini_run(seed=2)
    path = saved.save(1)
    assert len(list((path / "dense").iterdir())) > 3
    assert len(list((path / "tables" / ENGRAM).iterdir())) > 3

    fresh.load(path)

    assert fresh.equals(saved.tensors())
    for start, stop in ((0, 53), (0, 1), (52, 53), (7, 8), (5, 41), (53, 53)):
        assert torch.equal(
            CheckpointReader(path).rows(ENGRAM, start, stop), saved.tables[ENGRAM].read(start, stop)["rows"]
        )


def test_weights_alone_leave_optimizer_and_random_states(mini_run: Callable[..., Any]) -> None:
    saved, fresh = mini_run(seed=1), mini_run(seed=2)
    before, path = fresh.tensors(), saved.save(1)
    torch.rand(3)
    torch_state = torch.get_rng_state()

    loaded = fresh.load(path, optimizer_state=False)

    expected = {
        name: (value if name.startswith("master.") or name.endswith(".rows") else before[name])
        for name, value in saved.tensors().items()
    }
    assert fresh.equals(expected)
    assert loaded["rng"] == {} and torch.equal(torch.get_rng_state(), torch_state)


def test_reader(mini_run: Callable[..., Any]) -> None:
    saved = mini_run(seed=1)
    reader = CheckpointReader(saved.save(7))
    reader.verify()
    assert reader.step == 7 and reader.meta == saved.meta
    assert reader.names() == sorted(entry.name for entry in saved.entries)
    assert reader.tables() == {ENGRAM: (53, 4), BANK: (5, 9)}
    for entry in saved.entries:
        state = dict(saved.states[id(entry.tensor)])
        master = state.pop("master")[entry.rows]
        assert reader.shape(entry.name) == tuple(master.shape)
        assert torch.equal(reader.tensor(entry.name), master)
        moments = reader.moments(entry.name)
        assert moments.keys() == state.keys()
        assert all(torch.equal(moments[key], state[key][entry.rows]) for key in state)
    with pytest.raises(CheckpointError, match=r"has no tensor decoder.layers.9"):
        reader.tensor("decoder.layers.9.input_layernorm.weight")
    with pytest.raises(CheckpointError, match=r"has no table bank"):
        reader.rows("bank", 0, 1)


def test_copy_of_a_tied_tensor_is_filled_but_not_written(mini_run: Callable[..., Any]) -> None:
    saved, fresh = mini_run(seed=1), mini_run(seed=2)
    copy = torch.nn.Parameter(torch.zeros(7, 6))
    for run in (saved, fresh):
        entry = run.entries[0]
        run.entries.append(type(entry)(entry.name, copy, entry.rows, entry.tp_dim, is_copy=True))
    fresh.states[id(copy)] = {"master": copy.detach(), "exp_avg": copy.clone(), "exp_avg_sq": copy.clone()}

    fresh.load(saved.save(1))

    assert torch.equal(copy, saved.embedding)
    assert torch.equal(fresh.states[id(copy)]["exp_avg"], saved.states[id(saved.embedding)]["exp_avg"])


def test_nothing_is_pickled(mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint was pickled")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    saved, fresh = mini_run(seed=1), mini_run(seed=2)
    path = saved.save(1)
    fresh.load(path)
    assert fresh.equals(saved.tensors())
    monkeypatch.undo()
    for file in (file for file in path.parent.rglob("*") if file.is_file()):
        head = io.BytesIO(file.read_bytes()).read(4)
        assert head[:1] != b"\x80" and head[:2] != b"PK", file


def test_find_checkpoint(mini_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no checkpoint"):
        find_checkpoint(tmp_path)
    path = mini_run().save(3)
    assert find_checkpoint(path) == find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == path


def test_compare_models_names_the_setting() -> None:
    def meta(model: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
        return {"config": {"model": to_dict(model), "memory": to_dict(memory), "train": {"seed": 1}}}

    base = meta(ModelConfig(), MemoryConfig())
    same = meta(ModelConfig(attention_backend="sdpa", moe=MoEConfig(token_dispatcher="alltoall")), MemoryConfig())
    compare_models(base, same)
    with pytest.raises(CheckpointError, match=r"model\.moe\.num_experts is 8 there and 4 in this run"):
        compare_models(base, meta(ModelConfig(moe=MoEConfig(num_experts=4)), MemoryConfig()))
    with pytest.raises(CheckpointError, match=r"memory\.engram\.orders is \[2, 3\] there and \[2\] in this run"):
        compare_models(base, meta(ModelConfig(), MemoryConfig(engram=EngramConfig(orders=[2]))))


def test_new_memories_leave_the_addresses_of_old_ones_as_they_were() -> None:
    def meta(engram: dict[str, Any], bank: dict[str, Any]) -> dict[str, Any]:
        memory = MemoryConfig(engram=EngramConfig(**engram), bank=BankConfig(**bank))
        return {"config": {"model": to_dict(ModelConfig()), "memory": to_dict(memory)}}

    one, tree = {"layers": [1]}, {"units": [4, 0], "layers": [0]}
    changed_bank = {**tree, "branching": 8}
    for saved, current in (
        (meta({}, {}), meta({"layers": [1], "seed": 3, "fold_tokens": True}, changed_bank)),
        (meta(one, {}), meta({"layers": [1, 2]}, changed_bank)),
        (meta({}, tree), meta({"layers": [1], "seed": 3}, {**tree, "layers": []})),
    ):
        compare_models(saved, current, new_memories=True)
    for name, saved, current in (
        (r"memory\.engram\.seed is 0 there and 3", meta(one, {}), meta({"layers": [1, 2], "seed": 3}, tree)),
        (r"memory\.engram\.fold_tokens", meta(one, {}), meta({"layers": [1, 2], "fold_tokens": True}, {})),
        (r"memory\.engram\.pad_id", meta(one, tree), meta({"layers": [1], "pad_id": 0}, tree)),
        (r"memory\.bank\.branching is 16 there and 8", meta({}, tree), meta(one, changed_bank)),
        (r"memory\.bank\.units", meta({}, tree), meta(one, {**tree, "units": [4, 4]})),
    ):
        with pytest.raises(CheckpointError, match=name):
            compare_models(saved, current, new_memories=True)
    with pytest.raises(CheckpointError, match=r"memory\.engram\.layers"):
        compare_models(meta(one, {}), meta({"layers": [1, 2]}, {}))
