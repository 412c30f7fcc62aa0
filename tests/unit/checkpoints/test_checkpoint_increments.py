"""Tables saved as the rows that changed: every checkpoint is whole by itself, whatever came before it and whatever goes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megamem.errors import CheckpointError
from megamem.memory.config import DiskConfig, StorageConfig
from megamem.memory.placement import Placement
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem.memory.tiers.resources import TierResources
from megamem_checkpoints import manifest as manifests
from megamem_checkpoints import owned, tables
from megamem_checkpoints.manifest import read_manifest
from megamem_checkpoints.owned import Base, TableSave
from megamem_checkpoints.reader import CheckpointReader
from megamem_checkpoints.stream import write_tensors
from megamem_kernels.formats import row_fields

ENGRAM, BANK = "decoder.layers.1.engram.table", "decoder.layers.0.bank.level1.table"


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned, "FILE_BYTES", 350)
    monkeypatch.setattr(owned, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(tables, "READ_BYTES", 250)


def change(run: Any, rows: list[int], seed: int = 0) -> None:
    """Update some rows of the Engram table and their state."""
    gradient = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(seed))

    def rule(touched: Any, state: Any, part: Tensor) -> None:
        touched.fields["rows"][touched.slots] += part
        state.arrays["exp_avg"][state.slots] *= 0.5
        state.arrays["last_step"][state.slots] += 1

    run.tables[ENGRAM].update(np.array(rows), gradient, rule)


def deltas(path: Path, name: str = ENGRAM) -> dict[int, int]:
    """By step of an increment, its rows."""
    found: dict[int, int] = {}
    for item in CheckpointReader(path).manifest.tables[name].increments:
        step = int(Path(item.file).name.split("_")[1])
        found[step] = found.get(step, 0) + item.count
    return found


def inodes(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in (path / "tables" / ENGRAM).iterdir()}


def test_a_chain_of_increments_reads_back_at_every_link(mini_run: Callable[..., Any]) -> None:
    run = mini_run(seed=1, keep=9, incremental="auto")
    states, paths = [], []
    for step, rows in enumerate([[], [3, 50, 7], [], [7, 8, 52, 0], [51, 7]]):
        if rows:
            change(run, rows, seed=step)
        paths.append(run.save(step))
        states.append(run.tensors())
    assert [deltas(path) for path in paths] == [{}, {1: 3}, {1: 3}, {1: 3, 3: 4}, {1: 3, 3: 4, 4: 2}]
    base = inodes(paths[0])
    assert len(base) > 5 and all(base.items() <= inodes(path).items() for path in paths)
    assert deltas(paths[4], BANK) == {}
    for path, state in zip(paths, states, strict=True):
        fresh = mini_run(seed=2)
        fresh.load(path)
        assert fresh.equals(state)
        reader = CheckpointReader(path)
        reader.verify()
        assert torch.equal(reader.rows(ENGRAM, 5, 53), state[f"{ENGRAM}.rows"][5:])
    for path in paths[:4]:
        shutil.rmtree(path)
    fresh = mini_run(seed=3)
    fresh.load(paths[4])
    assert fresh.equals(states[4])


def test_old_checkpoints_go_and_the_files_that_count_stay(mini_run: Callable[..., Any]) -> None:
    run, fresh = mini_run(seed=1, keep=1, incremental="auto"), mini_run(seed=2)
    for step in range(1, 5):
        change(run, [step, 40], seed=step)
        path = run.save(step)
    assert [entry.name for entry in path.parent.glob("step_*")] == [path.name]
    assert deltas(path) == {2: 2, 3: 2, 4: 2}
    fresh.load(path)
    assert fresh.equals(run.tensors())


@pytest.mark.parametrize(("rows", "mode", "increment"), [(15, "auto", True), (16, "auto", False), (40, "on", True)])
def test_the_share_of_changed_rows_decides(mini_run: Callable[..., Any], rows: int, mode: str, increment: bool) -> None:
    assert 15 / 53 < owned.CHANGED_SHARE < 16 / 53
    run, fresh = mini_run(seed=1, incremental=mode), mini_run(seed=2)
    run.save(1)
    change(run, list(range(rows)))
    path = run.save(2)
    assert deltas(path) == ({2: rows} if increment else {})
    fresh.load(path)
    assert fresh.equals(run.tensors())


def test_increments_never_come_to_more_than_the_table(mini_run: Callable[..., Any]) -> None:
    run, fresh = mini_run(seed=1, keep=99, incremental="on"), mini_run(seed=2)
    chains = []
    for step in range(8):
        path = run.save(step)
        chains.append(list(deltas(path).values()))
        change(run, list(range(step, step + 13)), seed=step)
    record = run.tables[ENGRAM].record_bytes
    assert chains == [[], [13], [13] * 2, [13] * 3, [], [13], [13] * 2, [13] * 3]
    assert 3 * 13 * (record + 8) < 53 * record <= 4 * 13 * (record + 8)
    fresh.load(path)
    assert not fresh.equals(run.tensors())
    run.save(9)
    fresh.load(run.checkpointer.latest())
    assert fresh.equals(run.tensors())


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_a_file_system_without_links_gets_whole_tables(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    run, fresh = mini_run(seed=1, incremental="auto"), mini_run(seed=2)
    run.save(1)

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    owned._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=owned.__name__):
        for step in (2, 3):
            change(run, [step])
            path = run.save(step)
            assert deltas(path) == {} and CheckpointReader(path).manifest.tables[ENGRAM].gap() is None
    mine = [record.message for record in caplog.records if record.name == owned.__name__]
    assert [os.strerror(number) in text for text in mine] == [True]
    fresh.load(path)
    assert fresh.equals(run.tensors())


def test_a_link_that_is_refused_late_fails_the_save_and_the_next_one_is_whole(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fresh = mini_run(seed=1, incremental="auto"), mini_run(seed=2)
    good = run.save(1)
    change(run, [2])
    link, main = os.link, threading.get_ident()

    def refuse(*names: Any) -> None:
        if threading.get_ident() != main:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(CheckpointError, match=r"step 2 was not written .*Too many links"):
            run.save(2)
    assert {entry.name for entry in good.parent.iterdir()} == {".lock", "latest", good.name}
    path = run.save(2)
    assert deltas(path) == {}
    fresh.load(path)
    assert fresh.equals(run.tensors())


def test_how_many_checkpoints_share_a_file_is_bounded(mini_run: Callable[..., Any]) -> None:
    """Also across resumes, for tables that never change, and by the steps that stay."""
    run = mini_run(seed=1, keep=99, incremental="on")
    paths = []
    for step in range(1, 12):
        run.checkpointer.config.full_every = 3
        run.checkpointer.config.keep_every = 5
        change(run, [step], seed=step)
        paths.append(run.save(step))
        if step in (2, 8):
            run = mini_run(seed=step, keep=99, incremental="on")
            run.load(paths[-1])
    # Whole at first, then after two more, and where keep_every keeps.
    assert [read_manifest(path).chain for path in paths] == [0, 1, 2, 0, 0, 1, 2, 0, 1, 0, 1]
    assert [len(deltas(path)) for path in paths] == [0, 1, 2, 0, 0, 1, 2, 0, 1, 0, 1]
    for name in (ENGRAM, BANK):
        links = [{file.stat().st_nlink for file in (path / "tables" / name).glob("rows_*")} for path in paths]
        assert links == [{3}, {3}, {3}, {1}, {3}, {3}, {3}, {2}, {2}, {2}, {2}]
    # One damaged base, and the checkpoints of another chain are as they were.
    victim = next((paths[6] / "tables" / ENGRAM).glob("rows_*"))
    victim.write_bytes(bytes(victim.stat().st_size))
    fresh = mini_run(seed=4)
    for path in paths[4:7]:
        with pytest.raises(CheckpointError, match="its sha256 differs"):
            fresh.load(path)
    for path in (paths[3], paths[7], paths[10]):
        fresh.load(path)
    assert fresh.equals(run.tensors())


def test_a_base_that_was_damaged_is_not_built_upon(mini_run: Callable[..., Any]) -> None:
    run, fresh = mini_run(seed=1, incremental="auto"), mini_run(seed=2)
    victim = next((run.save(1) / "tables" / ENGRAM).iterdir())
    os.truncate(victim, 5)
    change(run, [4])
    path = run.save(2)
    assert deltas(path) == {}
    fresh.load(path)
    assert fresh.equals(run.tensors())


@pytest.mark.parametrize(("mode", "share"), [("off", 0.0), ("auto", 0.29), ("on", 0.99)])
def test_what_a_save_holds_per_row_is_bounded(tmp_path: Path, mode: str, share: float) -> None:
    count = 40_000
    table = OwnedTable.create(TableSpec("t", count, 2, (InitSegment(2, 0.1),)), seed=0)
    table.snapshot(tmp_path, track_changes=mode != "off").close()
    if table._changed is not None:
        table._changed[: int(share * count)] = True
    taken = table.snapshot(tmp_path, changed_only=mode != "off", track_changes=mode != "off")
    held = taken._where.nbytes
    if mode != "off":
        assert taken._only is not None and table._changed is not None
        held += taken._only.nbytes + table._changed.nbytes + taken.positions.nbytes
    assert 0.98 * owned.index_bytes(count, mode) <= held <= owned.index_bytes(count, mode)
    taken.close()


def test_a_second_save_of_one_step_is_whole(mini_run: Callable[..., Any]) -> None:
    run, fresh = mini_run(seed=1, incremental="auto"), mini_run(seed=2)
    for step, expected in ((1, {}), (2, {2: 1}), (2, {}), (3, {3: 1})):
        change(run, [step], seed=step)
        path = run.save(step)
        assert deltas(path) == expected
        fresh.load(path)
        assert fresh.equals(run.tensors())


def test_a_resumed_run_adds_to_the_checkpoint_it_came_from(mini_run: Callable[..., Any]) -> None:
    first, resumed, fresh = (mini_run(seed=seed, incremental="auto") for seed in (1, 2, 3))
    first.save(1)
    change(first, [1, 2])
    path = first.save(2)
    resumed.load(path)
    change(resumed, [2, 30], seed=7)
    path = resumed.save(3)
    assert deltas(path) == {2: 2, 3: 2}
    fresh.load(path)
    assert fresh.equals(resumed.tensors())
    fresh.load(path, optimizer_state=False)  # its state is not that of the checkpoint any more
    assert deltas(fresh.save(4)) == {}


def test_a_failed_save_is_followed_by_a_whole_one(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fresh = mini_run(seed=1, incremental="auto"), mini_run(seed=2)
    good = run.save(1)
    before = run.tensors()
    change(run, [5])
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(owned, "write_tensors", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run.save(2)
    assert run.checkpointer.latest() == good
    fresh.load(good)
    assert fresh.equals(before)
    change(run, [6])
    path = run.save(2)
    assert deltas(path) == {}
    fresh.load(path)
    assert fresh.equals(run.tensors())


def delta_file(path: Path) -> Path:
    return next((path / "tables" / ENGRAM).glob("delta_*"))


def test_damage_of_an_increment_is_found(mini_run: Callable[..., Any]) -> None:
    run = mini_run(seed=1, incremental="auto")
    run.save(1)
    change(run, [9, 10])
    path = run.save(2)
    content = bytearray(delta_file(path).read_bytes())
    content[-5] ^= 1
    delta_file(path).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"delta_00000002_.* is not what was written \(its sha256 differs\)"):
        run.load(path)
    delta_file(path).unlink()
    with pytest.raises(CheckpointError, match=r"delta_00000002_.* is missing"):
        CheckpointReader(path)


@pytest.mark.parametrize("positions", [[10, 9], [9, 9], [9, 11], [-1, 10], [8, 10], [9], [9, 10, 11]])
def test_an_increment_of_other_positions_than_stated_is_refused(
    mini_run: Callable[..., Any], positions: list[int]
) -> None:
    run = mini_run(seed=1, incremental="auto")
    run.save(1)
    change(run, [9, 10])
    path = run.save(2)
    tensors = load_file(delta_file(path))
    write_tensors(delta_file(path), {**tensors, tables.POSITIONS: torch.tensor(positions)})
    record = CheckpointReader.__new__(CheckpointReader)
    record.path, record.manifest = path, manifests.read_manifest(path)
    with pytest.raises(CheckpointError, match=r"delta_.* does not hold the positions"):
        record.rows(ENGRAM, 0, 53)


def test_ranges_and_scattered_positions_are_read_alike(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mini_run(seed=1, incremental="on")
    run.save(1)
    for step, rows in ((2, [0, 9, 10]), (3, [10, 52]), (4, [3, 9, 51])):
        change(run, rows, seed=step)
        path = run.save(step)
    reader = CheckpointReader(path)
    assert len(reader.manifest.tables[ENGRAM].increments) == 3
    expected = run.tables[ENGRAM].read(0, 53)
    for open_at_once in (64, 1):
        monkeypatch.setattr(tables, "_INCREMENTS_OPEN", open_at_once)
        files = tables.OpenFiles(path)
        for start, stop in ((0, 53), (0, 1), (9, 11), (11, 20), (50, 53)):
            scattered = np.random.default_rng(stop).permutation(np.arange(start, stop))
            by_range = tables.read(files, reader.manifest.tables[ENGRAM], range(start, stop), state=True)
            by_array = tables.read(files, reader.manifest.tables[ENGRAM], scattered, state=True)
            assert by_range.keys() == by_array.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(by_range[key], value[start:stop])
                assert torch.equal(by_array[key], value[scattered])


@pytest.mark.parametrize("broken", [{"stop": 54}, {"start": -1}, {"count": 0}, {"count": 3}, {"file": "tables/other"}])
def test_a_manifest_with_impossible_increments_is_damaged(mini_run: Callable[..., Any], broken: dict[str, Any]) -> None:
    run = mini_run(seed=1, incremental="auto")
    run.save(1)
    change(run, [9, 10])
    path = run.save(2)
    manifest = manifests.read_manifest(path)
    for name, value in broken.items():
        setattr(manifest.tables[ENGRAM].increments[0], name, value)
    (path / "manifest.json").write_text(manifest.dumps())
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: (increment|it states no checksum of)"):
        CheckpointReader(path)


def test_checkpoints_of_version_2_are_read_and_built_upon(mini_run: Callable[..., Any]) -> None:
    saved, fresh = mini_run(seed=1), mini_run(seed=2, incremental="auto")
    path = saved.save(1)
    body = json.loads((path / "manifest.json").read_text())
    del body["manifest_sha256"]
    body["format_version"] = 2
    for record in body["tables"].values():
        assert record.pop("increments") == []
    (path / "manifest.json").write_text(json.dumps({**body, "manifest_sha256": manifests._checksum(body)}))
    fresh.load(path)
    assert fresh.equals(saved.tensors())
    change(fresh, [4])
    assert deltas(fresh.save(2)) == {2: 1}


ROWS, WIDTH = 101, 5
SPEC = TableSpec("t", ROWS, WIDTH, (InitSegment(WIDTH, 0.02),))


def part(owner: int, owners: int, placement: str, format: str, tier: str, root: Path) -> OwnedTable:
    return OwnedTable.create(
        SPEC,
        owners=owners,
        owner=owner,
        seed=0,
        placement=Placement(placement, ROWS),
        storage=StorageConfig(tier=tier, format=format),
        resources=TierResources(disk_root=root, disk=DiskConfig(cache_gib=1e-6)),
    )


def save_all(folder: Path, parts: list[OwnedTable], step: int, bases: list[Base | None]) -> list[Base]:
    """What the owners write, as :class:`megamem_checkpoints.save.Saving` has them do it."""
    (folder / "tables").mkdir(parents=True)
    saves = [TableSave(folder, part, step, base, "auto") for part, base in zip(parts, bases, strict=True)]
    for save in saves:
        for piece in save.plan():
            save.write(*piece)
        save.close()
    return [Base(folder, {"t": save.record}, save.files) for save in saves]


@pytest.mark.parametrize("placement", ["contiguous", "scrambled"])
@pytest.mark.parametrize("format", ["fp32", "fp8"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_owners_of_which_some_wrote_increments_read_back_into_any_number(
    tmp_path: Path, placement: str, format: str, tier: str
) -> None:
    parts = [part(owner, 3, placement, format, tier, tmp_path / "disk") for owner in range(3)]
    bases: list[Base | None] = [None] * 3
    rng = np.random.default_rng(4)
    for step, shares in enumerate(([0, 0, 0], [0.1, 0.2, 0.9], [0.2, 0, 0.1])):
        for table, share in zip(parts, shares, strict=True):
            count = table.stop - table.start
            chosen = np.sort(rng.permutation(count)[: int(share * count)])
            for local in chosen:
                content = {
                    field.name: torch.from_numpy(rng.integers(1, 99, field.nbytes, dtype=np.uint8))
                    .view(field.dtype)
                    .reshape(1, *field.shape)
                    for field in row_fields(format, WIDTH)
                }
                table.write(table.start + int(local), content)
        bases = list(save_all(tmp_path / str(step), parts, step, bases))
    records = [base.tables["t"] for base in bases if base is not None]
    assert [len({Path(item.file).name[:14] for item in record.increments}) for record in records] == [2, 1, 1]
    merged = tables.merge(records)
    expected = {
        key: torch.cat([table.read(table.start, table.stop)[key].view(torch.uint8) for table in parts])
        for key in parts[0].read(0, 1)
    }
    for owners in (1, 2, 3, 5):
        found = [part(owner, owners, placement, format, "host", tmp_path) for owner in range(owners)]
        for table in found:
            tables.restore(tmp_path / "2", merged, table, state=True, label="x:y", threads=3)
        for key, value in expected.items():
            assert torch.equal(torch.cat([t.read(t.start, t.stop)[key].view(torch.uint8) for t in found]), value)
        for table, whole in zip(found, parts, strict=False):
            of = tables.part_of(merged, table.start, table.stop)
            assert (of is not None) == ((table.start, table.stop) == (whole.start, whole.stop) or owners == 1)
    other = part(0, 1, "scrambled" if placement == "contiguous" else "contiguous", format, "host", tmp_path)
    tables.restore(tmp_path / "2", merged, other, state=True, label="x:y")
    rows = np.arange(ROWS)
    mine, theirs = other.placement.positions(rows), parts[0].placement.positions(rows)
    for key, value in expected.items():
        assert torch.equal(other.read(0, ROWS)[key].view(torch.uint8)[mine], value[theirs])
    for table in parts:
        table.close()
