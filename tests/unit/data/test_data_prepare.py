"""The whole preparation: one request, one directory, all or nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamem.errors import ConfigError, DataError
from megamem_data.config import DataConfig, SourceConfig, TokenizerConfig
from megamem_data.prepare import prepare
from megamem_data.prepared import PreparedData
from megamem_data.shards import ShardWriter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = [[f"{topic}{i:02d}" for i in range(30)] for topic in ("fox", "sea", "sun")]
    for number in range(48):
        lines = [" ".join(rng.choice(words[number % 3], 6)) for _ in range(5 + number % 7)]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines))
    (folder / "99.txt").write_text("")
    return folder


def config(corpus: Path, path: Path, **changes: Any) -> DataConfig:
    base = DataConfig(
        path=str(path),
        sources=[SourceConfig(path=str(corpus))],
        tokenizer=TokenizerConfig(vocab_size=285),
        validation_fraction=0.2,
        shard_tokens=1500,
        cluster_dimensions=8,
        workers=1,
    )
    return dataclasses.replace(base, **changes)


def run(data: DataConfig, *, branching: int = 3, levels: int = 2, seed: int = 5, strict: bool = False) -> PreparedData:
    return prepare(data, branching=branching, levels=levels, seed=seed, strict=strict, progress=False)


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return run(config(corpus, tmp_path_factory.mktemp("out") / "data"))


def test_documents_come_back(prepared: PreparedData, corpus: Path) -> None:
    assert prepared.manifest.documents == len(prepared.lengths) == 48
    assert prepared.manifest.counts == {"documents": 48, "empty": 1, "invalid_utf8": 0, "binary": 0}
    assert len(prepared.shards) > 2 and (prepared.vocab_size, prepared.eos_id) == (285, 1)
    tokens = np.concatenate([shard.tokens for shard in prepared.shards])
    assert len(tokens) == prepared.manifest.tokens
    for number, ids in enumerate(np.split(tokens, np.cumsum(prepared.lengths)[:-1])):
        assert ids[-1] == prepared.eos_id
        assert prepared.tokenizer.decode(ids[:-1]) == (corpus / f"{number:02d}.txt").read_text()


def test_splits_are_disjoint_and_complete(prepared: PreparedData) -> None:
    train, validation = prepared.documents("train"), prepared.documents("validation")
    assert sorted([*train, *validation]) == list(range(48)) and 3 <= len(validation) <= 20
    assert len(prepared.stream("train")) + len(prepared.stream("validation")) == prepared.manifest.tokens


def test_paths_follow_topics_and_route_new_text(prepared: PreparedData, corpus: Path) -> None:
    paths = np.asarray(prepared.document_paths)
    assert paths.shape == (48, 2) and (prepared.levels, prepared.branching) == (2, 3)
    for topic in range(3):
        assert len(set(paths[topic::3, 0])) == 1
    assert len(set(paths[:3, 0])) == 3
    assert prepared.clusters is not None
    prompt = prepared.tokenizer.encode((corpus / "07.txt").read_text())
    assert np.array_equal(prepared.clusters.assign(prompt), paths[7])
    assert prepared.manifest.leaf_balance == np.bincount(paths[:, 1], minlength=9).max() * 9 / 48


def test_same_request_same_bytes(prepared: PreparedData, corpus: Path, tmp_path: Path) -> None:
    again = run(config(corpus, tmp_path / "again", workers=2, seq_length=64))
    assert again.fingerprint == prepared.fingerprint
    assert again.clusters is not None and prepared.clusters is not None
    assert again.clusters.fingerprint == prepared.clusters.fingerprint
    files = (again.manifest.files, prepared.manifest.files)
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name]["sha256"] != files[1][name]["sha256"]] in (
        [],
        ["clusters.safetensors"],  # whose header lists its metadata in any order
    )


def test_finished_data_is_used_again_or_refused(
    prepared: PreparedData, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in prepared.path.iterdir()}
    data = config(corpus, prepared.path)
    prepare(data, branching=3, levels=2, seed=5)
    assert "already prepared" in capsys.readouterr().err
    assert run(data, levels=1).levels == 2  # the tree's upper level is the same
    assert run(data, branching=99, levels=0).levels == 2
    for arguments, message in (
        ({"seed": 6}, "train.seed=5, not 6;"),
        ({"branching": 4}, "memory.bank.branching=3, not 4;"),
        ({"levels": 3}, "levels of memory.bank.units=2, not 3;"),
        ({"strict": True}, "strict=False, not True;"),
    ):
        with pytest.raises(DataError, match=message) as failure:
            run(data, **arguments)
        assert "another data.path, or delete" in str(failure.value)
    with pytest.raises(DataError, match=r"data\.shard_tokens=1500, not 1600 \(and 1 more\)"):
        run(config(corpus, prepared.path, shard_tokens=1600, validation_fraction=0.3))
    assert {file: file.stat().st_mtime_ns for file in prepared.path.iterdir()} == before


def test_changed_sources_are_another_request(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in corpus.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = config(folder, tmp_path / "data")
    run(data, levels=0)
    (folder / "03.txt").write_text("something else")
    with pytest.raises(DataError, match=r"data\.sources\[0\] files="):
        run(data, levels=0)


def test_an_existing_tokenizer_is_taken(prepared: PreparedData, corpus: Path, tmp_path: Path) -> None:
    data = config(corpus, tmp_path / "data", tokenizer=TokenizerConfig(model=str(prepared.tokenizer_model)))
    mine = run(data, levels=0)
    assert mine.tokenizer.sha256 == prepared.tokenizer.sha256
    assert mine.levels == 0 and mine.clusters is None and mine.document_paths.shape == (48, 0)
    assert not (mine.path / "clusters.safetensors").exists()
    data.tokenizer.model = str(tmp_path / "none.model")
    with pytest.raises(DataError, match=r"data\.tokenizer\.model cannot be read"):
        run(data, levels=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": []}, ConfigError, "data.sources is empty"),
        ({"tokenizer": TokenizerConfig(vocab_size=60_000)}, DataError, "lower it to at most"),
        ({"encoder": "mini"}, DataError, "needs the package sentence-transformers"),
    ],
)
def test_a_failure_leaves_nothing(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(error, match=message):
        run(config(corpus, tmp_path / "data", **changes))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        run(dataclasses.replace(config(corpus, tmp_path), path=""))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot be written .*No space left .*; free space there"),
        (BrokenProcessPool(), r"was killed, .* set data\.workers to fewer"),
    ],
)
def test_a_full_disk_and_a_killed_worker_leave_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    add = ShardWriter.add

    def failing(writer: ShardWriter, tokens: np.ndarray, lengths: np.ndarray) -> None:
        add(writer, tokens, lengths)
        raise failure

    monkeypatch.setattr(ShardWriter, "add", failing)
    with pytest.raises(DataError, match=message):
        run(config(corpus, tmp_path / "data"))
    assert not list(tmp_path.iterdir())


def test_a_corpus_without_text_or_without_training_documents(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="hold no text"):
        run(config(folder, tmp_path / "data"))
    single = SourceConfig(path=str(corpus), max_documents=1)
    with pytest.raises(DataError, match="all 1 documents fall into the validation split"):
        run(
            config(
                corpus,
                tmp_path / "data",
                sources=[single],
                validation_fraction=0.999999,
                tokenizer=TokenizerConfig(vocab_size=275),
            )
        )


def test_leftovers_of_killed_runs_go_and_those_of_running_ones_stay(corpus: Path, tmp_path: Path) -> None:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    dead = tmp_path / f"data.tmp-{socket.gethostname()}-{finished.pid}"
    alive = tmp_path / f"data.tmp-{socket.gethostname()}-{os.getppid()}"
    elsewhere = tmp_path / f"data.tmp-other-host-{finished.pid}"
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
    run(config(corpus, tmp_path / "data"), levels=0)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "data", alive, elsewhere])


def test_something_else_at_the_path_is_kept(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(DataError, match=r"is no prepared data; set another data\.path"):
        run(config(corpus, tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "x"


@pytest.fixture
def copy(prepared: PreparedData, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in prepared.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    "name", ["shard_00000.bin", "shard_00001.idx", "tokenizer.model", "clusters.safetensors", "paths.npy"]
)
def test_damage_is_noticed_and_named(copy: Path, name: str) -> None:
    assert PreparedData.open(copy, verify=True).levels == 2
    content = bytearray((copy / name).read_bytes())
    (copy / name).write_bytes(content[:-2])
    with pytest.raises(DataError, match=f"{name} has .* bytes in place of"):
        PreparedData.open(copy)
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} does not match its checksum"):
        PreparedData.open(copy, verify=True)
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        PreparedData.open(copy)


@pytest.mark.parametrize("name", ["shard_00000.bin", "shard_00001.bin", "paths.npy"])
def test_the_ranks_of_a_run_together_hash_every_file(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    noticed = 0
    for rank in range(3):
        try:
            PreparedData.open(copy, verify=True, rank=rank, ranks=3)
        except DataError as error:
            assert f"{name} does not match its checksum" in str(error)
            noticed += 1
    assert noticed == 1


def test_training_refuses_a_flipped_bit(prepared_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared_tiny, tmp_path / "data")
    shard = tmp_path / "data" / "shard_00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1  # still a token of the vocabulary
    shard.write_bytes(content)
    settings = [f"data.path={tmp_path / 'data'}", f"runs_dir={tmp_path / 'runs'}", "tracking.mlflow=false"]
    config = Path(__file__).parents[3] / "configs" / "tiny.yaml"
    command = [sys.executable, "-m", "megamem.cli", "train", str(config), *settings]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"megamem train: {shard} does not match its checksum")
    assert not (tmp_path / "runs").exists()


def test_manifest_damage_is_noticed(copy: Path) -> None:
    manifest = json.loads((copy / "data.json").read_text())
    for change, message in (
        ({"vocab_size": 286}, "does not match its fingerprint"),
        ({"format": "megamem-data-9"}, "has the format 'megamem-data-9'"),
        ({"surprise": 1}, r"data\.json is damaged"),
        ({"files": []}, r"data\.json is damaged"),
        ({"format": "megamem-data-9", "surprise": 1}, "has the format 'megamem-data-9'"),
    ):
        (copy / "data.json").write_text(json.dumps(manifest | change))
        with pytest.raises(DataError, match=message):
            PreparedData.open(copy)
    (copy / "data.json").write_text("[1]")
    with pytest.raises(DataError, match=r"data\.json is damaged"):
        PreparedData.open(copy)
    (copy / "data.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.json is damaged"):
        PreparedData.open(copy)
    (copy / "data.json").unlink()
    with pytest.raises(DataError, match="holds no prepared data; run `megamem data prepare`"):
        PreparedData.open(copy)
