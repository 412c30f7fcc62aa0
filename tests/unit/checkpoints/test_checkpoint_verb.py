"""``megamem checkpoint``: what it lists, finds damaged, finds different and deletes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamem.errors import CheckpointError, ConfigError
from megamem.memory.config import StorageConfig
from megamem.memory.placement import Placement
from megamem.memory.table import OwnedTable
from megamem_checkpoints import directory, integrity
from megamem_checkpoints.files import writer_lock
from megamem_checkpoints.listing import disk_usage
from megamem_checkpoints.reader import CheckpointReader
from megamem_launch.verbs.checkpoint import main

ENGRAM = "decoder.layers.1.engram.table"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """What the verb prints with ``--json``; it must end with ``code``."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def table_file(path: Path, table: str = ENGRAM) -> Path:
    return next((path / "tables" / table).glob("*.safetensors"))


def test_every_action_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ([], ["ls"], ["verify"], ["diff"], ["prune"]):
        with pytest.raises(SystemExit) as end:
            main([*action, "--help"])
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert "Examples:" in out and "megamem checkpoint " + " ".join(action) in out
    for arguments in ([], ["lss"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2


@pytest.mark.parametrize("arguments", [["ls"], ["verify"], ["prune"], ["diff", "{}"]], ids=lambda a: a[0])
def test_a_directory_without_checkpoints_is_named(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.* has no checkpoint"):
        main([*(a.format(tmp_path) for a in arguments), str(tmp_path)])


@pytest.mark.parametrize(
    "arguments", [["prune", "x", "--keep", "0"], ["prune", "x", "--keep-every=-1"], ["verify", "x", "--threads", "0"]]
)
def test_numbers_are_checked(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="set it to at least"):
        main(arguments)


def test_list(mini_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = mini_run(keep=5)
    run.meta["layout"] = {"world_size": 4, "tp": 2, "pp": 2, "ep": 1, "first_stage_layers": 3}
    first, second, third = (run.save(step) for step in (10, 20, 30))
    (first / "manifest.json").write_text("{}")
    linked = table_file(third)
    linked.unlink()
    os.link(table_file(second), linked)
    (third.parent / "step_00000040.tmp").mkdir()

    found = run_json(capsys, "ls", tmp_path)
    damaged, middle, last = found["checkpoints"]
    assert [Path(one["path"]).name for one in found["checkpoints"]] == [first.name, second.name, third.name]
    assert [one["latest"] for one in found["checkpoints"]] == [False, False, True]
    assert "manifest.json" in damaged["problem"] and damaged["step"] is None
    assert (last["step"], last["world_size"], last["layout"], last["problem"]) == (30, 1, "tp2 pp2", "")
    assert (last["tables"], last["incremental_tables"]) == (2, 0)
    size = sum(path.stat().st_size for path in third.rglob("*") if path.is_file())
    assert last["bytes"] == size and last["own_bytes"] == size - linked.stat().st_size
    assert found["bytes"] < sum(one["bytes"] for one in found["checkpoints"]) + 1000
    assert found["unfinished"] == ["step_00000040.tmp"]
    assert middle["saved"] <= last["saved"]

    assert main(["ls", str(third.parent)]) == 0
    out = capsys.readouterr().out
    assert "3 checkpoints" in out and "<- latest" in out and "tp2 pp2" in out and "damaged" in out
    assert f"{first}/manifest.json is damaged" in out and "step_00000040.tmp: a save under way" in out


def test_verify_names_every_bad_file(
    mini_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mini_run()
    first, second = run.save(1), run.save(2)
    found = run_json(capsys, "verify", tmp_path)
    assert found["ok"] and [one["damaged"] for one in found["checkpoints"]] == [{}, {}]
    assert found["checkpoints"][0]["files"] == sum(path.is_file() for path in first.rglob("*")) - 1
    flipped, cut = table_file(second), second / "rng" / "rank_00000.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-3] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])

    found = run_json(capsys, "verify", tmp_path, code=2)
    bad = found["checkpoints"][1]["damaged"]
    assert not found["ok"] and set(bad) == {
        flipped.relative_to(second).as_posix(),
        cut.relative_to(second).as_posix(),
    }
    assert "sha256 differs" in bad[flipped.relative_to(second).as_posix()]
    assert main(["verify", str(second), "--threads", "1"]) == 2
    captured = capsys.readouterr()
    assert "2 DAMAGED" in captured.out and len(captured.err.splitlines()) == 2 and flipped.name in captured.err
    assert main(["verify", str(first)]) == 0
    assert "whole" in capsys.readouterr().out
    (first / "manifest.json").write_text("x")
    found = run_json(capsys, "verify", first, code=2)
    assert set(found["checkpoints"][0]["damaged"]) == {"manifest.json"}


def test_a_shared_file_is_read_once(
    mini_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mini_run()
    first, second = run.save(1), run.save(2)
    linked, read = table_file(second), []
    linked.unlink()
    os.link(table_file(first), linked)
    original = integrity.check_content

    def counting(root: Path, name: str, record: Any) -> None:
        read.append((root / name).stat().st_ino)
        original(root, name, record)

    monkeypatch.setattr(integrity, "check_content", counting)
    done: list[int] = []
    verification = integrity.Verification([first, second])
    assert not any(one.damaged for one in verification.run(threads=2, advance=done.append))
    assert len(read) == len(set(read)) and linked.stat().st_ino in read
    assert sum(done) == verification.bytes
    with linked.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert [list(one.damaged) for one in integrity.Verification([first, second]).run(threads=2)] == [
        [linked.relative_to(second).as_posix()]
    ] * 2


def test_diff(mini_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = mini_run(keep=9)
    run.meta["config"] = {"name": "one", "train": {"seed": 1, "steps": 5}}
    first = run.save(1)
    run.meta["config"] = {"name": "one", "train": {"seed": 2}, "new": [1]}
    assert run_json(capsys, "diff", first, run.save(2)) | {"settings": 0} == {
        "equal": True,
        "a": {"path": str(first), "step": 1},
        "b": {"path": str(first.with_name("step_00000002")), "step": 2},
        "settings": 0,
        "dense": [],
        "tables": [],
        "only_in_a": [],
        "only_in_b": [],
    }
    with torch.no_grad():
        run.norm[2] += 0.5
        run.states[id(run.fc1)]["exp_avg"][7] -= 3
    table = run.tables[ENGRAM]
    rows = table.read(4, 6)
    rows["rows"][:, 1] += 2
    rows["state.last_step"][1] += 1
    table.write(4, rows)
    state = table.read(50, 51)
    state["state.exp_avg"][0, 0] = torch.nan
    table.write(50, state)
    second = run.save(3)

    found = run_json(capsys, "diff", first, tmp_path, code=1)
    assert found["settings"] == [["train.seed", 1, 2], ["train.steps", 5, None], ["new", None, [1]]]
    assert [(one["name"], pytest.approx(one["largest"], rel=1e-5)) for one in found["dense"]] == [
        ("decoder.final_layernorm.weight", 0.5),
        ("exp_avg.decoder.layers.0.mlp.linear_fc1.up.weight", 3.0),
    ]
    (one,) = found["tables"]
    assert (one["name"], one["rows"], one["rows_changed"], one["state_changed"]) == (ENGRAM, 53, 2, 2)
    assert one["largest"] == pytest.approx(2.0)
    assert main(["diff", str(first), str(second)]) == 1
    out = capsys.readouterr().out
    assert f"{ENGRAM}  2 of 53 rows by at most 2.000e+00, state of 2" in out and "train.seed  1  2" in out


def test_diff_of_other_placements_and_formats(mini_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = mini_run(keep=9), mini_run(keep=9)
    table = a.tables[ENGRAM]
    scrambled = OwnedTable.create(
        table.spec, seed=0, placement=Placement("scrambled", 53), state_fields=table.state.fields[:-1]
    )
    logical = scrambled.placement.logical(np.arange(53))
    scrambled.write(0, {key: value[logical] for key, value in table.read(0, 53).items()})
    b.tables[ENGRAM] = scrambled
    first, second = a.save(1), b.save(2)
    assert run_json(capsys, "diff", first, second)["equal"]
    rounded = mini_run(keep=9, storage=StorageConfig(format="bf16"))
    one = run_json(capsys, "diff", first, rounded.save(3), code=1)["tables"][1]
    assert (one["name"], one["rows_changed"], one["state_changed"]) == (ENGRAM, 53, 0)
    assert 0 < one["largest"] < 0.02


def test_diff_of_other_names_and_shapes(mini_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = mini_run(), mini_run(hidden=8)
    entry = b.entries.pop()
    b.entries.append(type(entry)("decoder.layers.9.norm", entry.tensor, entry.rows, None))
    del b.tables[ENGRAM]
    found = run_json(capsys, "diff", a.save(1), b.save(2), code=1)
    assert found["only_in_a"] == ["decoder.final_layernorm.weight", ENGRAM]
    assert found["only_in_b"] == ["decoder.layers.9.norm"]
    first = found["dense"][0]
    assert (first["largest"], first["note"]) == (None, "[5, 6] and [5, 8]")


def test_prune(mini_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = mini_run(keep=9)
    paths = [run.save(step) for step in (10, 15, 20, 25, 30)]
    folder = paths[0].parent
    (folder / "step_00000035.tmp").mkdir()
    (folder / "step_00000035.tmp" / "half").write_bytes(b"x" * 1000)
    kept = table_file(paths[-1])
    kept.unlink()
    os.link(table_file(paths[1]), kept)
    before = names(folder)
    _, freed = disk_usage([paths[1], paths[3], folder / "step_00000035.tmp"])

    command = ["prune", tmp_path, "--keep", "1", "--keep-every", "10"]
    planned = run_json(capsys, *command, "--dry-run")
    assert planned["paths"] == ["step_00000035.tmp", "step_00000015", "step_00000025"] and not planned["deleted"]
    assert names(folder) == before and planned["bytes"] == freed
    assert main([*map(str, command)]) == 0
    assert "3 directories deleted" in capsys.readouterr().out
    assert names(folder) == {"latest", "step_00000010", "step_00000020", "step_00000030"}
    assert kept.stat().st_nlink == 1
    assert run_json(capsys, *command)["paths"] == []


def test_prune_refuses_while_a_run_trains_or_saves(
    mini_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mini_run(keep=9)
    folder = run.save(1).parent
    run.save(2)
    for locked, doing in ((tmp_path, "training"), (folder, "writing a checkpoint into")):
        with (
            writer_lock(locked, doing=doing),
            pytest.raises(CheckpointError, match=f"another process is {doing} {locked}"),
        ):
            main(["prune", str(tmp_path), "--keep", "1"])
        assert {"step_00000001", "step_00000002"} <= names(folder)
    assert main(["prune", str(tmp_path), "--keep", "1"]) == 0
    assert names(folder) == {"latest", "step_00000002"}


def test_a_damaged_checkpoint_does_not_count_as_kept(mini_run: Callable[..., Any]) -> None:
    run = mini_run(keep=9)
    paths = [run.save(step) for step in (1, 2, 3, 4)]
    folder = paths[0].parent
    table_file(paths[2]).unlink()
    assert directory.prunable(folder, keep=2) == paths[:1]
    (folder / "latest").write_text("step_00000001\n")
    assert directory.prunable(folder, keep=1) == paths[1:3]
    assert directory.prunable(folder, keep=1, keep_every=2) == paths[2:3]
    assert directory.prunable(folder, keep=1, step=3) == []
    assert directory.prunable(folder, keep=4) == []


def test_what_was_moved_aside_goes_only_when_something_whole_is_left(mini_run: Callable[..., Any]) -> None:
    run = mini_run(keep=9)
    first, second = run.save(4), run.save(5)
    aside = first.rename(first.with_name("step_00000004.replaced"))
    assert directory.prunable(first.parent, keep=1, keep_every=4) == [aside]
    assert directory.steps(first.parent) == [second]
    directory.delete(second)
    assert directory.prunable(first.parent, keep=1) == [] and directory.latest(first.parent) == aside


def test_milestones_stay_while_a_run_saves(mini_run: Callable[..., Any]) -> None:
    run = mini_run(keep=1)
    run.checkpointer.config.keep_every = 4
    for step in range(1, 10):
        run.save(step)
    assert names(run.checkpointer.directory) == {"latest", "step_00000004", "step_00000008", "step_00000009"}


def test_a_checkpoint_that_disappears_during_verify_is_gone_and_not_damaged(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mini_run(keep=5, incremental="on")
    first, second = run.save(1), run.save(2)
    check, one_prune = integrity.check_content, threading.Lock()

    def after_pruning(root: Path, name: str, record: Any) -> None:
        with one_prune:  # several threads check; who deletes holds the writer's lock
            directory.delete(first)
        check(root, name, record)

    monkeypatch.setattr(integrity, "check_content", after_pruning)
    found = run_json(capsys, "verify", first.parent)
    assert found["ok"] and [one["gone"] for one in found["checkpoints"]] == [True, False]
    assert not any(one["damaged"] for one in found["checkpoints"])
    assert names(second.parent) == {"latest", second.name}


def test_verify_of_nothing_is_not_well(mini_run: Callable[..., Any], tmp_path: Path) -> None:
    path = mini_run().save(1)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000001 has no checkpoint: its manifest\.json is missing"):
        main(["verify", str(path)])
    path.rename(path.with_name(path.name + ".tmp"))
    with pytest.raises(CheckpointError, match=r"has no checkpoint, only what unfinished saves"):
        main(["verify", str(tmp_path)])


def test_sizes_are_found_while_folders_disappear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_bytes(b"12345")
    walk = os.scandir

    def vanishing(path: Any) -> Any:
        if Path(path).name in ("one", "two") and (tmp_path / "one").exists() and (tmp_path / "two").exists():
            (Path(path) / "file").unlink()
            Path(path).rmdir()
        return walk(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert disk_usage([tmp_path]) == (5, 5)


def test_prune_reads_what_it_keeps(
    mini_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mini_run(keep=9)
    paths = [run.save(step) for step in (1, 2, 3)]
    for path in paths[1:]:  # the same length, another content; `latest` names one of them
        file = table_file(path)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.unlink()
        file.write_bytes(content)
    assert run_json(capsys, "prune", tmp_path, "--keep", "1")["paths"] == []
    assert all(path.exists() for path in paths)


def test_a_checkpoint_that_vanishes_is_not_called_damaged(mini_run: Callable[..., Any], tmp_path: Path) -> None:
    run = mini_run(keep=9)
    path = run.save(1)
    reader = CheckpointReader(path)
    directory.delete(path)
    with pytest.raises(CheckpointError, match="was deleted while it was read"):
        reader.verify()
