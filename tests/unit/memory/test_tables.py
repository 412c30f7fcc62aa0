"""Owned tables: initial rows, what they promise over owners, placements, tiers and formats, and their traffic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megamem.memory.config import DiskConfig, StorageConfig
from megamem.memory.placement import Placement
from megamem.memory.spec import InitSegment, TableSpec, disk_bytes
from megamem.memory.table import OwnedTable
from megamem.memory.tiers.resources import TierResources
from megamem_kernels.formats import Field, row_fields
from megamem_kernels.row_gather import dequantize_rows
from megamem_kernels.row_update import TouchedRows, TouchedState, rowwise_adagrad_

NORMAL = (InitSegment(6, 0.5),)
MIXED = TableSpec("t", 23, 6, (InitSegment(3, 0.5), InitSegment(1, 0.0), InitSegment(2, 0.1, truncated=True)))
STATE = (Field("accumulator", torch.float32, ()),)


def values_of(table: OwnedTable) -> Tensor:
    """Owned rows as fp32."""
    stored = table.rows.read(0, table.stop - table.start)
    return dequantize_rows(stored, torch.empty(table.stop - table.start, table.spec.width))


def initial(spec: TableSpec, seed: int = 0) -> Tensor:
    return values_of(OwnedTable.create(spec, seed=seed))


@pytest.mark.parametrize("placement", ["contiguous", "scrambled"])
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
def test_initial_rows_depend_on_the_logical_row_alone(format: str, placement: str, tmp_path: Path) -> None:
    where = Placement(placement, 23)
    whole = values_of(OwnedTable.create(MIXED, seed=3, storage=StorageConfig(format=format)))
    assert whole.unique(dim=0).shape == (23, 6) and not whole[:, 3].any()
    for tier in ("device", "host", "disk"):
        for owners in (1, 2, 5, 23, 30):
            parts = [
                OwnedTable.create(
                    MIXED,
                    owners=owners,
                    owner=owner,
                    seed=3,
                    placement=where,
                    storage=StorageConfig(tier=tier, format=format),
                    resources=TierResources(disk_root=tmp_path, disk=DiskConfig(cache_gib=1e-7)),
                )
                for owner in range(owners)
            ]
            assert [(part.start, part.stop) for part in parts] == [
                (min(i * -(-23 // owners), 23), min((i + 1) * -(-23 // owners), 23)) for i in range(owners)
            ]
            assert torch.equal(torch.cat([values_of(part) for part in parts])[where.positions(np.arange(23))], whole)
            assert all(part.usage == 0 for part in parts)
            for part in parts:
                part.close()
    assert not list(tmp_path.iterdir())


def test_rows_depend_on_seed_and_name() -> None:
    base = initial(TableSpec("a", 50, 6, NORMAL))
    assert torch.equal(base, initial(TableSpec("a", 50, 6, NORMAL)))
    assert not torch.equal(base, initial(TableSpec("a", 50, 6, NORMAL), seed=1))
    assert not torch.equal(base, initial(TableSpec("b", 50, 6, NORMAL)))


def test_segments_have_their_own_distribution() -> None:
    init = (InitSegment(8, 0.5), InitSegment(8, 0.02, truncated=True), InitSegment(4, 0.0))
    rows = initial(TableSpec("t", 20_000, 20, init)).numpy()
    assert rows[:, :8].std() == pytest.approx(0.5, rel=0.01) and abs(rows[:, :8].mean()) < 0.005
    assert np.abs(rows[:, :8]).max() > 1.5
    # A normal truncated at two standard deviations has 0.8796 of its standard deviation.
    assert rows[:, 8:16].std() == pytest.approx(0.8796 * 0.02, rel=0.01)
    assert 0.0399 < np.abs(rows[:, 8:16]).max() <= 0.04 * (1 + 1e-6)
    assert not rows[:, 16:].any()
    assert len(np.unique(rows[:, 0])) > 19_000


def test_init_must_cover_the_width() -> None:
    with pytest.raises(ValueError, match="table t"):
        TableSpec("t", 4, 7, NORMAL)


@pytest.mark.parametrize(
    ("tier", "state_tier"), [("host", "same"), ("disk", "host"), ("host", "disk"), ("disk", "disk"), ("device", "disk")]
)
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
def test_gather_and_update_are_the_same_on_every_tier(format: str, tier: str, state_tier: str, tmp_path: Path) -> None:
    """A disk cache of a few rows, smaller than what one step touches."""
    spec = TableSpec("t", 501, 37, (InitSegment(37, 0.1),))
    where = Placement("scrambled", spec.rows)
    options = {"owners": 2, "owner": 1, "seed": 1, "placement": where, "state_fields": STATE}
    plain = OwnedTable.create(spec, storage=StorageConfig(format=format), **options)
    storage = StorageConfig(tier=tier, state_tier=state_tier, format=format)
    size = disk_bytes(spec, owners=2, owner=1, storage=storage, state_fields=STATE)
    resources = TierResources(disk_root=tmp_path, disk_bytes=size, disk=DiskConfig(cache_gib=9e-6, queue_depth=3))
    table = OwnedTable.create(spec, storage=storage, resources=resources, **options)
    assert tier != "disk" or table.rows.capacity < 200
    random = np.random.default_rng(0)
    count = plain.stop - plain.start
    touched = set()
    for step in range(1, 8):
        local = random.permutation(count)[: random.integers(0, count)]
        gradient = torch.from_numpy(random.standard_normal((len(local), 37), dtype=np.float32))
        touched |= set(local.tolist())

        def rule(rows: TouchedRows, state: TouchedState, gradient: Tensor, step: int = step) -> None:
            assert (where.positions(rows.ids.numpy()) >= plain.start).all()
            rowwise_adagrad_(rows, state, gradient, lr=0.1, epsilon=1e-8, weight_decay=0.1, step=step)

        for target in (plain, table):
            target.update(local, gradient, rule)
        asked = random.integers(0, count, 300)  # with repeats
        out = [{f.name: f.allocate(300) for f in row_fields(format, 37)} for _ in range(2)]
        plain.gather(asked, out[0])
        table.gather(asked, out[1])
        for name in out[0]:
            assert torch.equal(out[0][name].view(torch.uint8), out[1][name].view(torch.uint8))
    everything, same = plain.read(plain.start, plain.stop), table.read(plain.start, plain.stop)
    assert {"rows", "state.accumulator", "state.touched"} <= everything.keys() == same.keys()
    for key, tensor in everything.items():
        assert torch.equal(tensor.reshape(count, -1).view(torch.uint8), same[key].reshape(count, -1).view(torch.uint8))
    assert plain.usage == table.usage == len(touched) / count
    table.write(plain.start, {key: tensor for key, tensor in everything.items() if key.startswith("state.")})
    assert table.usage == plain.usage
    held = table.resident_bytes()
    assert held.get("disk", 0) == size and (("host" in held) or size == 0)
    table.close()
    plain.close()


def test_an_owner_without_rows(tmp_path: Path) -> None:
    for tier in ("host", "disk"):
        storage, resources = StorageConfig(tier=tier), TierResources(disk_root=tmp_path)
        table = OwnedTable.create(
            TableSpec("t", 2, 6, NORMAL), owners=3, owner=2, seed=0, storage=storage, resources=resources
        )
        assert table.start == table.stop and table.usage == 0
        none = np.empty(0, dtype=np.int64)
        table.gather(none, {"rows": torch.empty(0, 6)})
        table.update(none, torch.empty(0, 6), lambda *_: pytest.fail("nothing to update"))
        assert table.read(2, 2)["rows"].shape == (0, 6)
        table.close()
