"""Tables read back under any owners, placement, tier and format; disk files that are at the checkpoint are not read again."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megamem.errors import CheckpointError, TierError
from megamem.memory.config import DiskConfig, StorageConfig
from megamem.memory.placement import Placement
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem.memory.tiers.disk import DiskStore
from megamem.memory.tiers.resources import TierResources
from megamem_checkpoints import manifest as manifests
from megamem_checkpoints import owned, tables
from megamem_checkpoints import save as saving
from megamem_checkpoints.manifest import read_manifest
from megamem_checkpoints.owned import TableSave
from megamem_checkpoints.reader import CheckpointReader
from megamem_kernels.formats import Field, row_fields
from megamem_kernels.rounding import quantize_rows
from megamem_kernels.row_gather import dequantize_rows

ENGRAM = "decoder.layers.1.engram.table"
ROWS, WIDTH = 101, 37
SPEC = TableSpec("t", ROWS, WIDTH, (InitSegment(WIDTH, 0.02),))
VALUES = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
MOMENTS = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))


def make(
    owner: int,
    owners: int,
    placement: str,
    format: str,
    *,
    filled: bool,
    tier: str = "host",
    root: Path | None = None,
    resume: str = "",
) -> OwnedTable:
    table = OwnedTable.create(
        SPEC,
        owners=owners,
        owner=owner,
        seed=0,
        placement=Placement(placement, ROWS),
        storage=StorageConfig(tier=tier, format=format),
        state_fields=(Field("exp_avg", torch.float32, (3,)),),
        resources=TierResources(disk_root=root, disk=DiskConfig(cache_gib=2e-6), resume=resume),
    )
    if filled:
        logical = torch.from_numpy(table.placement.logical(np.arange(table.start, table.stop)))
        touched = (logical % 2).to(torch.uint8)
        table.write(
            table.start,
            {**stored(VALUES[logical], format), "state.exp_avg": MOMENTS[logical], "state.touched": touched},
        )
    return table


def stored(values: Tensor, format: str) -> dict[str, Tensor]:
    fields = {field.name: field.allocate(len(values)) for field in row_fields(format, WIDTH)}
    quantize_rows(values.contiguous(), fields)
    return fields


def rounded(values: Tensor, *formats: str) -> Tensor:
    for format in formats:
        values = dequantize_rows(stored(values, format), torch.empty(values.shape))
    return values


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned, "FILE_BYTES", 1500)


def write(folder: Path, owners: int, placement: str, format: str, **options: Any) -> Any:
    parts = [make(owner, owners, placement, format, filled=True, **options) for owner in range(owners)]
    saves = [TableSave(folder, part, 1, None, "off") for part in parts]
    for save in saves:
        for piece in save.plan():
            save.write(*piece)
        save.close()
    for part in parts:
        part.close()
    return tables.merge([save.record for save in saves])


@pytest.mark.parametrize(
    ("format", "other"), [*itertools.product(["fp32", "bf16", "fp8"], ["fp32", "bf16"]), ("fp8", "fp8")]
)
@pytest.mark.parametrize(("placement", "new"), itertools.product(["contiguous", "scrambled"], repeat=2))
def test_any_layout_reads_back_into_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, new: str, format: str, other: str
) -> None:
    monkeypatch.setattr(tables, "READ_BYTES", 4000)
    record = write(tmp_path, 3, placement, format)
    assert len(record.files) > 5
    expected = rounded(VALUES, format, other)
    for owners, tier in ((1, "host"), (2, "disk"), (5, "host")):
        found = torch.full((ROWS, WIDTH), torch.nan)
        for owner in range(owners):
            table = make(owner, owners, new, other, filled=False, tier=tier, root=tmp_path / "disk")
            tables.restore(tmp_path, record, table, state=True, label="x:y")
            logical = torch.from_numpy(table.placement.logical(np.arange(table.start, table.stop)))
            content = table.read(table.start, table.stop)
            found[logical] = dequantize_rows(
                {name: content[name] for name in table.rows.arrays}, torch.empty(len(logical), WIDTH)
            )
            assert torch.equal(content["state.exp_avg"], MOMENTS[logical])
            assert torch.equal(content["state.touched"], (logical % 2).to(torch.uint8))
            assert table.usage == float((logical % 2).double().sum()) / max(1, len(logical))
            table.close()
        assert torch.equal(found, expected)
    rows = [np.array([100, 0, 57, 58, 3])]
    rows += [np.arange(start, stop) for start, stop in ((0, 101), (0, 0), (40, 77), (100, 101))]
    for wanted in rows:
        positions = tables.placement_of(record).positions(wanted)
        stored = tables.read(tables.OpenFiles(tmp_path), record, positions, state=False)
        values = dequantize_rows(stored, torch.empty(len(wanted), WIDTH))
        assert torch.equal(values, rounded(VALUES, format)[wanted])


def test_a_table_larger_than_its_cache_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned, "_CHUNK_BYTES", 400)
    pieces = []
    stored = OwnedTable.stored

    def counted(table: OwnedTable, local: slice) -> dict[str, Tensor]:
        pieces.append(local.stop - local.start)
        return stored(table, local)

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(OwnedTable, "stored", counted)
    on_disk = write(tmp_path / "a", 2, "contiguous", "bf16", tier="disk", root=tmp_path / "disk")
    assert max(pieces) <= 400 // (2 * WIDTH + 13) and sum(pieces) == ROWS
    in_memory = write(tmp_path / "b", 2, "contiguous", "bf16")
    assert on_disk == in_memory
    for name in on_disk.files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_checkpoints_of_version_1_are_read(mini_run: Callable[..., Any]) -> None:
    saved, fresh = mini_run(seed=1), mini_run(seed=2)
    path = saved.save(1) / "manifest.json"
    body = json.loads(path.read_text())
    del body["manifest_sha256"]
    body["format_version"] = 1
    assert manifests.FORMAT_VERSION == 3
    for record in body["tables"].values():
        assert record.pop("increments") == []
        assert record.pop("format") == "fp32"
        assert record.pop("placement") == {"name": "contiguous", "multiplier": 1}
    path.write_text(json.dumps({**body, "manifest_sha256": manifests._checksum(body)}))
    fresh.load(path.parent)
    assert fresh.equals(saved.tensors())
    assert torch.equal(CheckpointReader(path.parent).rows(ENGRAM, 5, 20), saved.tables[ENGRAM].read(5, 20)["rows"])


def test_a_placement_that_is_none_is_refused(mini_run: Callable[..., Any]) -> None:
    path = mini_run().save(1)
    manifest = manifests.read_manifest(path)
    manifest.tables[ENGRAM].placement = manifests.PlacementRecord(name="scrambled", multiplier=106)
    (path / "manifest.json").write_text(manifest.dumps())
    with pytest.raises(
        CheckpointError, match=r"placement of table decoder.layers.1.engram.table is no bijection of its 53"
    ):
        CheckpointReader(path)


def on_disk(root: Path, **options: Any) -> dict[str, Any]:
    resources = TierResources(disk_root=root / "disk", disk=DiskConfig(cache_gib=1e-6), **options)
    return {"storage": StorageConfig(tier="disk"), "resources": resources}


def test_disk_files_of_the_checkpoint_are_kept_and_not_read_again(
    mini_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = mini_run(seed=1, **on_disk(tmp_path))
    path = saved.save(1)
    expected = saved.tensors()
    label = CheckpointReader(path).label
    for table in saved.tables.values():
        assert table.committed == label
        table.update(np.arange(5), torch.ones(5, table.spec.width), lambda rows, *_: rows.fields["rows"].zero_())
        assert table.committed == ""
        table.close()

    again = mini_run(seed=2, **on_disk(tmp_path, resume=label))
    with monkeypatch.context() as patch:
        patch.setattr(tables, "read", lambda *_, **__: pytest.fail("the file is at the checkpoint"))
        again.load(path)
    assert again.equals(expected)
    for table in again.tables.values():
        table.close()

    # Another checkpoint is asked for: everything comes from it.
    other = mini_run(seed=3, **on_disk(tmp_path, resume="step_00000009:0"))
    assert not other.equals(expected)
    other.load(path)
    assert other.equals(expected)
    for table in other.tables.values():
        table.close()


def test_disk_files_of_another_placement_are_filled_again(tmp_path: Path) -> None:
    record = write(tmp_path, 1, "contiguous", "bf16")
    first = make(0, 1, "contiguous", "bf16", filled=True, tier="disk", root=tmp_path / "disk")
    first.commit("x:y")
    first.close()
    table = make(0, 1, "scrambled", "bf16", filled=False, tier="disk", root=tmp_path / "disk", resume="x:y")
    tables.restore(tmp_path, record, table, state=True, label="x:y")
    logical = torch.from_numpy(table.placement.logical(np.arange(ROWS)))
    assert torch.equal(table.read(0, ROWS)["rows"], VALUES[logical].bfloat16())
    assert torch.equal(table.read(0, ROWS)["state.exp_avg"], MOMENTS[logical])
    table.close()


def test_rows_without_their_state_are_not_taken_over(mini_run: Callable[..., Any], tmp_path: Path) -> None:
    saved = mini_run(seed=1, **on_disk(tmp_path))
    path = saved.save(1)
    expected, label = saved.tensors(), CheckpointReader(path).label
    for table in saved.tables.values():
        table.close()
    for name in ("state", "rows"):
        for file in (tmp_path / "disk").glob(f"*.{name}.commit"):
            file.unlink()
        again = mini_run(seed=2, **on_disk(tmp_path, resume=label))
        assert all(table.committed == "" for table in again.tables.values())
        again.load(path)
        assert again.equals(expected)
        for table in again.tables.values():
            table.commit(label)
            table.close()


def test_the_checkpoint_is_whole_where_disk_files_cannot_be_committed(
    mini_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved, fresh = mini_run(seed=1, incremental="auto", **on_disk(tmp_path)), mini_run(seed=2)

    def refuse(*_: object) -> None:
        raise TierError(f"t.rec: {os.strerror(errno.EIO)}; check the disk")

    monkeypatch.setattr(DiskStore, "commit", refuse)
    with caplog.at_level(logging.WARNING, logger=saving.__name__):
        path = saved.save(1)
    told = [record.message for record in caplog.records if record.name == saving.__name__]
    assert len(told) == len(saved.tables) and all("t.rec: Input/output error; check the disk" in text for text in told)
    assert [outcome.error for outcome in saved.checkpointer.ended()] == [None]
    assert fresh.checkpointer.latest() == path
    fresh.load(path)
    assert fresh.equals(saved.tensors())
    assert read_manifest(saved.save(2)).chain == 1
