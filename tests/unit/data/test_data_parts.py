"""Preparation in shares: the merged result is that of one machine, whatever the number of shares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megamem.errors import DataError
from megamem_data.config import DataConfig, SourceConfig, TokenizerConfig
from megamem_data.parts import merge_parts, parts_folder, prepare_part, prepare_tokenizer
from megamem_data.prepare import Job
from megamem_data.prepared import PreparedData
from megamem_data.sources import SourceCounts, portions, read_documents


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SourceConfig]:
    """Two folders, JSON lines in several files, and one source that is cut off: files of very different sizes, some empty."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = [f"word{i:02d}" for i in range(40)]
    for name, count in (("a", 13), ("b", 5)):
        (root / name).mkdir()
        for number in range(count):
            lines = [" ".join(rng.choice(words, 6)) for _ in range(1 + number * number % 17)]
            (root / name / f"{number:02d}.txt").write_text("\n".join(lines))
    (root / "a" / "05.txt").write_text("")
    (root / "b" / "01.txt").write_bytes(b"ill \xff formed")
    for number in range(4):
        records = [{"text": " ".join(rng.choice(words, 20))} for _ in range(3 + 5 * number)]
        (root / f"{number}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return [
        SourceConfig(path=str(root / "a")),
        SourceConfig(path=str(root / "b"), max_documents=3),
        SourceConfig(kind="jsonl", path=str(root / "*.jsonl")),
    ]


def job(sources: list[SourceConfig], path: Path, levels: int = 2, vocab_size: int = 280) -> Job:
    data = DataConfig(
        path=str(path),
        sources=sources,
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        validation_fraction=0.2,
        shard_tokens=700,
        cluster_dimensions=8,
        workers=1,
    )
    return Job(data, branching=3, levels=levels, seed=5, progress=False)


@pytest.fixture(scope="module")
def whole(sources: list[SourceConfig], tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return job(sources, tmp_path_factory.mktemp("whole") / "data").run()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_portions_in_order_are_all_documents(sources: list[SourceConfig], count: int) -> None:
    everything, parts = SourceCounts(), SourceCounts()
    expected = list(read_documents(sources, strict=False, counts=everything))
    found = []
    for number in range(count):
        chosen = portions(sources, number, count)
        found += read_documents(sources, strict=False, counts=parts, chosen=chosen)
    assert found == expected and len(expected) > 40
    assert parts == everything


def test_portions_have_about_equally_many_bytes(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03d}.txt").write_text("x" * (1 + number * 37 % 91))
    source = SourceConfig(path=str(tmp_path))
    sizes = [
        sum(file.stat().st_size for _, files in portions([source], number, 8) for file in files or ())
        for number in range(8)
    ]
    assert max(sizes) < 1.2 * sum(sizes) / 8


@pytest.mark.parametrize("count", [1, 3, 30])
def test_merged_shares_are_what_one_machine_writes(
    sources: list[SourceConfig], whole: PreparedData, tmp_path: Path, count: int
) -> None:
    one = job(sources, tmp_path / "data")
    prepare_tokenizer(one)
    for number in reversed(range(1, count + 1)):  # in any order
        prepare_part(one, number, count)
    # What a task leaves that is killed on another machine is no part, and goes with the parts.
    (parts_folder(one.path) / f"part-00001-of-{count:05d}.tmp-elsewhere-77").mkdir()
    merged = merge_parts(one)
    assert merged.fingerprint == whole.fingerprint
    assert merged.manifest.counts == whole.manifest.counts and merged.manifest.counts["invalid_utf8"] == 1
    assert merged.manifest.shards == whole.manifest.shards and len(merged.manifest.shards) > 2
    names = sorted(path.name for path in whole.path.iterdir())
    assert names == sorted(path.name for path in merged.path.iterdir())
    assert merged.manifest.request == whole.manifest.request
    # The header of the tree lists its metadata in any order, and the manifest has the hash of it.
    for name in set(names) - {"clusters.safetensors", "data.json"}:
        assert (merged.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert merged.clusters is not None and whole.clusters is not None
    assert merged.clusters.fingerprint == whole.clusters.fingerprint
    assert not parts_folder(merged.path).exists()


def test_finished_shares_are_used_again(sources: list[SourceConfig], tmp_path: Path) -> None:
    one = job(sources, tmp_path / "data", levels=0)
    prepare_tokenizer(one)
    prepare_part(one, 1, 2)
    folder = parts_folder(one.path) / "part-00001-of-00002"
    assert folder.is_dir()
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    prepare_tokenizer(one)
    prepare_part(one, 1, 2)
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_what_is_missing_damaged_or_of_another_request_is_named(sources: list[SourceConfig], tmp_path: Path) -> None:
    one = job(sources, tmp_path / "data", levels=0)
    with pytest.raises(DataError, match="run `megamem data tokenizer CONFIG` first"):
        prepare_part(one, 1, 2)
    prepare_tokenizer(one)
    with pytest.raises(DataError, match="holds no parts; run `megamem data prepare CONFIG --shard 1/N`"):
        merge_parts(one)
    prepare_part(one, 1, 2)
    with pytest.raises(DataError, match=r"part-00002-of-00002 is missing; run .* --shard 2/2` first"):
        merge_parts(one)
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab_size=280, not 281"):
        prepare_part(job(sources, tmp_path / "data", levels=0, vocab_size=281), 1, 2)
    prepare_part(one, 2, 2)
    shard = parts_folder(one.path) / "part-00002-of-00002" / "shard_00000.bin"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard_00000\.bin does not match its checksum"):
        merge_parts(one)
    assert not one.path.exists()
    record = shard.with_name("part.json")
    record.write_text(record.read_text().replace('"tokenizer": "', '"tokenizer": "x'))
    with pytest.raises(DataError, match=r"part-00002-of-00002 was made with another tokenizer; delete it"):
        prepare_part(one, 2, 2)
    prepare_part(one, 1, 3)
    with pytest.raises(DataError, match="holds parts of 2 and of 3"):
        merge_parts(one)
