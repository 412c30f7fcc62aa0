"""A save in the background holds what was there when it began, and its errors arrive at the next one."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamem.errors import CheckpointError, ConfigError
from megamem_checkpoints import checkpointer, dense, owned, rng, save
from megamem_checkpoints.config import CheckpointConfig
from megamem_checkpoints.manifest import read_manifest


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves write nothing until it is set."""
    opened, write = threading.Event(), rng.write

    def waiting(*args: Any) -> Any:
        assert opened.wait(60)
        return write(*args)

    monkeypatch.setattr(rng, "write", waiting)
    return opened


def change_everything(run: Any) -> None:
    """What a training step may do to what was handed to a checkpointer."""
    for states in run.states.values():
        for value in states.values():
            value.add_(1.0)
    for table in run.tables.values():
        count, width = table.stop - table.start, table.spec.width

        def rule(rows: Any, state: Any, part: torch.Tensor) -> None:
            rows.fields["rows"][rows.slots] += part
            state.arrays["exp_avg"][state.slots] += 1.0

        table.update(np.arange(count), torch.ones(count, width), rule)
    for value in run.rng.values():
        value.zero_()
    run.meta["losses"]["first"] = -1.0
    torch.manual_seed(12345)


def test_what_is_written_is_the_state_when_the_save_began(
    mini_run: Callable[..., Any], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned, "FILE_BYTES", 200)
    run, fresh, twin = mini_run(seed=1), mini_run(seed=2), mini_run(seed=1)
    expected, torch_state, own_state = (
        run.tensors(),
        torch.get_rng_state(),
        run.rng["tracker.model-parallel-rng"].clone(),
    )
    path = run.save(5, wait=False)
    change_everything(run)
    assert not path.exists() and run.checkpointer.ended() == []
    gate.set()
    run.checkpointer.wait()
    assert [(outcome.step, outcome.path, outcome.error) for outcome in run.checkpointer.ended()] == [(5, path, None)]
    assert run.checkpointer.ended() == []
    background = read_manifest(path)

    loaded = fresh.load(path)
    assert fresh.equals(expected) and not fresh.equals(run.tensors())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(loaded["rng"]["tracker.model-parallel-rng"], own_state)
    assert loaded["meta"]["losses"] == {"first": 10.25}

    # Waited for or not, the same files are written; torch orders the header of dense ones as it likes.
    torch.set_rng_state(torch_state)
    twin.save(5)
    found = read_manifest(path)
    assert found.dense == background.dense and found.tables == background.tables and found.meta == background.meta
    for name in found.files.keys() | background.files.keys():
        assert found.files[name].bytes == background.files[name].bytes
        assert name.startswith("dense/") or found.files[name] == background.files[name]


def test_no_tensor_of_the_copy_is_one_that_trains(mini_run: Callable[..., Any]) -> None:
    run = mini_run(seed=1)
    live = {value.untyped_storage().data_ptr() for states in run.states.values() for value in states.values()}
    copies, _ = dense.collect(run.entries, run.get, dense.Sharding(None))
    assert len(copies) == 3 * 4 + 1
    assert live.isdisjoint(value.untyped_storage().data_ptr() for value in copies.values())


def test_the_next_save_waits_for_the_one_before(mini_run: Callable[..., Any], gate: threading.Event) -> None:
    run, fresh = mini_run(seed=1), mini_run(seed=2)
    run.save(1, wait=False)
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    change_everything(run)
    run.save(2, wait=False)
    ended = run.checkpointer.ended()
    assert ended[0].step == 1
    run.checkpointer.close()
    assert [outcome.step for outcome in (*ended, *run.checkpointer.ended())] == [1, 2]
    fresh.load(run.checkpointer.latest())
    assert fresh.equals(run.tensors())


def test_an_error_of_the_background_is_told_and_the_next_save_is_attempted(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, fresh = mini_run(seed=1, incremental="auto"), mini_run(seed=2)
    good, before = run.save(1), run.tensors()
    run.checkpointer.ended()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("save", "start", "wait", "close"):
        change_everything(run)
        with monkeypatch.context() as patch:
            patch.setattr(save, "write_text", full)
            run.save(2, wait=False)
            while not (ended := run.checkpointer.ended()):
                pass
        assert "No space left on device" in str(ended[0].error)
        if call == "close":
            with caplog.at_level(logging.ERROR, logger=checkpointer.__name__):
                run.checkpointer.close()
            assert "step 2 was not written" in caplog.text
        elif call == "wait":
            with pytest.raises(CheckpointError, match=r"step 2 was not written .*No space left on device"):
                run.checkpointer.wait()
        else:
            with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger=checkpointer.__name__):
                patch.setattr(save, "write_text", full)
                with pytest.raises(CheckpointError, match=r"step 3 was not written .*No space left on device"):
                    run.save(3, wait=call == "save")
            assert [outcome.step for outcome in run.checkpointer.ended()] == [3]
            assert "No space left on device" in caplog.text and "trying again with that of step 3" in caplog.text
        assert {entry.name for entry in good.parent.iterdir()} == {".lock", "latest", good.name}
        fresh.load(good)
        assert fresh.equals(before)

    with monkeypatch.context() as patch:
        patch.setattr(save, "write_text", full)
        run.save(2, wait=False)
        assert isinstance(run.checkpointer._running[1].exception(), CheckpointError)
    change_everything(run)
    path = run.save(3, wait=False)  # not in the background this time
    outcomes = run.checkpointer.ended()
    assert [(outcome.step, outcome.error is None) for outcome in outcomes] == [(2, False), (3, True)]
    assert read_manifest(path).chain == 0
    again = mini_run(seed=3)
    again.load(path)
    assert again.equals(run.tensors())
    assert read_manifest(run.save(4)).chain == 1


def test_an_error_at_the_beginning_is_raised_at_once(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mini_run(seed=1)
    monkeypatch.setattr(owned.OwnedTable, "snapshot", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CheckpointError, match="step 1 was not written"):
        run.save(1, wait=False)
    monkeypatch.undo()
    assert [outcome.error is None for outcome in run.checkpointer.ended()] == [False]
    run.save(1)


def test_memories_that_a_checkpoint_lacks_keep_their_initial_values(
    mini_run: Callable[..., Any], tmp_path: Path
) -> None:
    saved, run = mini_run(seed=1), mini_run(seed=2)
    bank = saved.tables.popitem()
    path = saved.save(1)
    before = run.tables[bank[0]].read(0, 5)
    with pytest.raises(CheckpointError, match=r"of the memory tables it lacks decoder\.layers\.0\.bank"):
        run.load(path, optimizer_state=False)
    run.checkpointer.config = CheckpointConfig(load=str(path), new_memories=True)
    loaded = run.load(path, optimizer_state=False)
    assert loaded["kept"] == [bank[0]]
    assert torch.equal(run.fc1, saved.fc1)
    assert all(torch.equal(run.tables[bank[0]].read(0, 5)[key], value) for key, value in before.items())
    name = "decoder.layers.1.engram.table"
    assert torch.equal(run.tables[name].read(0, 53)["rows"], saved.tables[name].read(0, 53)["rows"])
    with pytest.raises(CheckpointError, match="it lacks"):  # a resume takes everything
        run.load(path)
    del saved.entries[0]
    with pytest.raises(CheckpointError, match=r"of the dense tensors it lacks embedding\.word_embeddings"):
        run.load(saved.save(2), optimizer_state=False)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="set load, or new_memories to false"):
        CheckpointConfig(new_memories=True)
    with pytest.raises(ConfigError, match="io_threads is 0"):
        CheckpointConfig(io_threads=0)
