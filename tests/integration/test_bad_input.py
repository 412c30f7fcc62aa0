"""What a careless user types: one sentence that names what to change, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamem.cli import main
from megamem.config import to_dict
from megamem.models.canonical import CanonicalEntry
from megamem_checkpoints.checkpointer import Checkpointer
from megamem_checkpoints.config import CheckpointConfig
from megamem_checkpoints.files import writer_lock
from megamem_launch.compose import open_data
from megamem_launch.config import load_config

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must end with code 2; returns its one sentence."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"megamem {arguments[0]}: ")
    return lines[0]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("memory.engram.widht=3", "did you mean `width`?"),
        ("model.make_vocab_size_divisible_by=0", "make_vocab_size_divisible_by is 0"),
        ("model.rotary_base=0", "rotary_base is 0.0"),
        ("model.moe.layers=[2, 2]", "name each layer once"),
        ("memory.optimizer.epsilon=.nan", "memory.optimizer.epsilon is nan; set a finite number"),
        ("memory.engram.pad_id=-7", "pad_id is -7"),
        ("optimizer.lr=.inf", "optimizer.lr is inf; set a finite number"),
        ("optimizer.lr=1e999", "optimizer.lr is inf; set a finite number"),
        ("train.eval_batches=-1", "eval_batches is -1"),
        ("train.steps=[", "is not valid YAML"),
        ("base=[tiny]", "base is ['tiny']"),
        ("name=..", "name is '..'"),
        ("parallel.nproc=3", "3 data-parallel ranks"),
    ],
)
def test_settings(folder: Path, capsys: pytest.CaptureFixture[str], setting: str, named: str) -> None:
    assert named in refused(capsys, "train", TINY, setting)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("text", ["? [a]\n: 3\n", "a: " + "[" * 5000, "- a\n", "base: tiny\nname: a\nname: b\n"])
def test_configuration_files(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (folder / "run.yaml").write_text(text)
    assert "run.yaml" in refused(capsys, "train", "run.yaml")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{kind: folder, path: nowhere}", "no file matches nowhere"),
        ("{kind: folder, path: text, pattern: ''}", "pattern is ''"),
        ("{kind: folder, path: text, pattern: /abs/**}", "pattern is '/abs/**'"),
        ("{kind: jsonl, path: deep.jsonl}", "line 1 of deep.jsonl is not JSON"),
        ("{kind: folder, path: text, max_documents: -1}", "max_documents is -1"),
    ],
)
def test_sources(folder: Path, capsys: pytest.CaptureFixture[str], source: str, named: str) -> None:
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("some text\n")
    (folder / "deep.jsonl").write_text("[" * 100_000)
    assert named in refused(capsys, "data", "prepare", TINY, "data.path=out/x", f"data.sources=[{source}]")
    assert not list((folder / "out").glob("*"))


def test_settings_may_follow_a_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad").write_bytes(b"caf\xe9\n")
    sentence = refused(capsys, "data", "prepare", TINY, "--strict", "data.path=x", "data.sources=[{path: bad}]")
    assert "bad is not valid UTF-8 (byte 3)" in sentence


@pytest.mark.parametrize("setting", ["data.path=file/x", "data.path=file"])
def test_a_file_where_a_directory_is_wanted(folder: Path, capsys: pytest.CaptureFixture[str], setting: str) -> None:
    (folder / "file").write_text("")
    (folder / "text.txt").write_text("some text\n")
    assert "file" in refused(capsys, "data", "prepare", TINY, setting, "data.sources=[{path: text.txt}]")


def test_one_flipped_bit_of_a_shard(folder: Path, prepared_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(prepared_tiny, folder / "data")
    shard = next((folder / "data").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert f"data/{shard.name} does not match its checksum" in refused(capsys, "train", TINY, "data.path=data")
    assert not (folder / "runs").exists()


def test_nothing_is_left_of_a_run_that_cannot_start(
    folder: Path, prepared_tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train", TINY, f"data.path={prepared_tiny}")
    assert "nowhere has no checkpoint" in refused(capsys, *arguments, "checkpoint.load=nowhere")
    assert not (folder / "runs").exists()
    (folder / "file").write_text("")
    assert "file/x" in refused(capsys, *arguments, "runs_dir=file/x")


def test_a_run_is_trained_by_one_process(folder: Path, prepared_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "tiny"
    run.mkdir(parents=True)
    with writer_lock(run, doing="training"):
        sentence = refused(capsys, "train", TINY, f"data.path={prepared_tiny}")
    assert "another process is training runs/tiny" in sentence
    assert [path.name for path in run.iterdir()] == [".lock"]


def tiny_checkpoint(folder: Path, data: Path, **meta: object) -> Path:
    """What a run of the tiny configuration on ``data`` might have saved, but for ``meta``."""
    config = load_config(TINY, [f"data.path={data}"])
    prepared = open_data(config, verify=False)
    weight = torch.nn.Parameter(torch.ones(3, 4))
    return Checkpointer(folder, CheckpointConfig(), groups=None).save(
        7,
        entries=[CanonicalEntry("decoder.final_layernorm.weight", weight, slice(None), None)],
        state_of=lambda parameter: {"master": parameter.detach()},
        tables={},
        meta={"config": to_dict(config), "tokenizer_sha256": prepared.tokenizer.sha256} | meta,
    )


def newer(path: Path) -> None:
    body = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(body | {"format_version": body["format_version"] + 1}))


def shard(path: Path) -> Path:
    return next((path / "dense").iterdir())


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: shard(path).unlink(), "is missing"),
        (lambda path: os.truncate(shard(path), 50), "50 bytes long in place of"),
        (newer, "update megamem"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
    ],
)
def test_a_checkpoint_to_start_from_that_is_damaged_or_newer(
    folder: Path, prepared_tiny: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], named: str
) -> None:
    path = tiny_checkpoint(folder / "other", prepared_tiny)
    damage(path)
    before = sorted(folder.rglob("*"))
    assert named in refused(capsys, "train", TINY, f"data.path={prepared_tiny}", f"checkpoint.load={path}")
    assert sorted(folder.rglob("*")) == before


def test_a_checkpoint_of_another_tokenizer_or_model(
    folder: Path, prepared_tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train", TINY, f"data.path={prepared_tiny}", "checkpoint.load=other")
    tiny_checkpoint(folder / "other", prepared_tiny, tokenizer_sha256="0" * 64)
    sentence = refused(capsys, *arguments)
    assert "another tokenizer (sha256 000000000000 there" in sentence and "data.tokenizer.model" in sentence
    tiny_checkpoint(folder / "other", prepared_tiny)
    sentence = refused(capsys, *arguments, "model.ffn_hidden_size=96")
    assert "model.ffn_hidden_size is 128 there and 96 in this run" in sentence
    assert not (folder / "runs").exists()
