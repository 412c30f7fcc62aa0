"""A snapshot is what the table held when it was taken, bit for bit, whatever is trained while it is read."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megamem.memory import snapshot as snapshots
from megamem.memory.config import DiskConfig, RowOptimizerConfig, StorageConfig
from megamem.memory.optimizers import RowOptimizer, build_row_optimizer
from megamem.memory.placement import Placement
from megamem.memory.snapshot import Snapshot
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem.memory.tiers.resources import TierResources

ROWS, WIDTH = 4001, 7
SPEC = TableSpec("t", ROWS, WIDTH, (InitSegment(WIDTH, 0.1),))


def build(
    root: Path, tier: str = "host", format: str = "fp32", state_tier: str = "same", optimizer: str = "rowwise_adagrad"
) -> tuple[OwnedTable, RowOptimizer]:
    """Owner 1 of 3 of a scattered table."""
    rule = build_row_optimizer(RowOptimizerConfig(name=optimizer))
    table = OwnedTable.create(
        SPEC,
        owners=3,
        owner=1,
        seed=5,
        placement=Placement("scrambled", ROWS),
        storage=StorageConfig(tier=tier, format=format, state_tier=state_tier),
        state_fields=rule.state_fields(WIDTH),
        resources=TierResources(disk_root=root / "disk", disk=DiskConfig(cache_gib=2e-5)),
    )
    return table, rule


def train(table: OwnedTable, rule: RowOptimizer, rng: np.random.Generator, step: int, share: float = 0.1) -> np.ndarray:
    count = table.stop - table.start
    touched = rng.permutation(count)[: int(share * count)]
    gradient = torch.from_numpy(rng.standard_normal((len(touched), WIDTH), dtype=np.float32))
    rule.update(table, touched, gradient, lr=0.3, step=step)
    return touched


def whole(table: OwnedTable) -> dict[str, Tensor]:
    return table.read(table.start, table.stop)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rows: np.ndarray | slice = slice(None)) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        assert np.array_equal(snapshots.bytes_of(one[key]), snapshots.bytes_of(other[key])[rows]), key


def read_in_pieces(taken: Snapshot, positions: range | np.ndarray, piece: int, threads: int) -> dict[str, Tensor]:
    """What several threads find, in the order of ``positions``; pieces are read in another order."""
    lows = np.random.default_rng(9).permutation(np.arange(0, len(positions), piece))
    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(lows, pool.map(lambda low: taken.read(positions[low : low + piece]), lows), strict=True))
    parts = [found[low] for low in sorted(found)]
    return {
        key: torch.cat([part[key].view(torch.uint8) for part in parts]).view(parts[0][key].dtype) for key in parts[0]
    }


@pytest.mark.parametrize("changed_only", [False, True], ids=["all", "changed"])
@pytest.mark.parametrize(
    ("tier", "format", "state_tier", "optimizer"),
    [
        *itertools.product(["host", "disk"], ["fp32", "bf16", "fp8"], ["same"], ["rowwise_adagrad"]),
        ("device", "fp32", "disk", "lazy_adam"),
        ("disk", "fp8", "host", "sgd"),
    ],
)
def test_exact_while_rows_are_updated(
    tmp_path: Path, tier: str, format: str, state_tier: str, optimizer: str, changed_only: bool
) -> None:
    table, rule = build(tmp_path, tier, format, state_tier, optimizer)
    rng = np.random.default_rng(3)
    table.track_changes()
    changed = np.unique(np.concatenate([train(table, rule, rng, step) for step in (1, 2)]))
    assert table.changed_rows == len(changed)
    expected = whole(table)
    taken = table.snapshot(tmp_path, changed_only=changed_only, track_changes=True)
    steps = 2
    stop, failures = threading.Event(), []

    def go_on() -> None:
        nonlocal steps
        try:
            while not stop.is_set() or steps < 5:
                steps += 1
                train(table, rule, rng, steps, share=0.3)
        except BaseException as error:
            failures.append(error)

    trainer = threading.Thread(target=go_on)
    trainer.start()
    positions: range | np.ndarray = taken.positions if changed_only else range(table.start, table.stop)
    try:
        found = read_in_pieces(taken, positions, piece=61, threads=3)
    finally:
        stop.set()
        trainer.join()
    assert not failures and steps > 2
    if changed_only:
        assert np.array_equal(positions, changed + table.start)
    assert_same(found, expected, changed if changed_only else slice(None))
    taken.close()
    # The snapshot has changed nothing of what was trained.
    undisturbed, rule = build(tmp_path / "other", tier, format, state_tier, optimizer)
    rng = np.random.default_rng(3)
    for step in range(1, steps + 1):
        train(undisturbed, rule, rng, step, share=0.1 if step <= 2 else 0.3)
    assert_same(whole(table), whole(undisturbed))
    for one in (table, undisturbed):
        one.close()


def test_an_old_record_is_written_down_once_and_only_while_it_is_needed(tmp_path: Path) -> None:
    table, rule = build(tmp_path)
    count = table.stop - table.start
    taken = table.snapshot(tmp_path)
    taken.read(range(table.start, table.start + 100))
    rng = np.random.default_rng(0)
    touched = np.unique(np.concatenate([train(table, rule, rng, step, share=0.2) for step in range(1, 4)]))
    kept = int((touched >= 100).sum())
    assert os.fstat(taken._log._file.fileno()).st_size == kept * table.record_bytes
    assert not list(tmp_path.iterdir())  # it has no name
    for start in range(table.start + 100, table.stop, 50):
        taken.read(range(start, min(start + 50, table.stop)))
    train(table, rule, rng, 4, share=1.0)
    assert os.fstat(taken._log._file.fileno()).st_size == kept * table.record_bytes < count * table.record_bytes
    with pytest.raises(ValueError, match="read once"):
        taken.read(range(table.start, table.start + 1))
    taken.close()
    table.close()


def test_changes_are_counted_from_one_snapshot_to_the_next(tmp_path: Path) -> None:
    table, rule = build(tmp_path)
    rng = np.random.default_rng(1)
    assert table.changed_rows is None
    with pytest.raises(ValueError, match="nobody tracked"):
        table.snapshot(tmp_path, changed_only=True)
    table.snapshot(tmp_path, track_changes=True).close()
    assert table.changed_rows == 0
    first = train(table, rule, rng, 1)
    taken = table.snapshot(tmp_path, changed_only=True, track_changes=True)
    assert np.array_equal(taken.positions, np.sort(first) + table.start)
    second = train(table, rule, rng, 2)
    assert table.changed_rows == len(second) and len(taken.positions) == len(first)
    taken.close()
    table.write(table.start + 5, {key: value[5:8] for key, value in whole(table).items()})
    assert table.changed_rows == len(np.union1d(second, [5, 6, 7]))
    table.snapshot(tmp_path).close()
    assert table.changed_rows is None
    table.close()


def test_a_table_with_a_snapshot_takes_no_second_one_and_is_not_filled(tmp_path: Path) -> None:
    table, _ = build(tmp_path)
    taken = table.snapshot(tmp_path)
    with pytest.raises(ValueError, match="has a snapshot"):
        table.snapshot(tmp_path)
    with pytest.raises(ValueError, match="written while a snapshot"):
        table.write(table.start, whole(table))
    taken.close()
    taken.close()
    table.write(table.start, whole(table))
    table.snapshot(tmp_path).close()
    table.close()


def test_no_room_for_old_records_fails_the_snapshot_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, rule = build(tmp_path)
    plain, same_rule = build(tmp_path)
    taken = table.snapshot(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rng, again = np.random.default_rng(2), np.random.default_rng(2)
    with monkeypatch.context() as patch:
        patch.setattr(snapshots._Log, "append", full)
        train(table, rule, rng, 1)
    train(table, rule, rng, 2)
    with pytest.raises(OSError, match="No space left on device"):
        taken.read(range(table.start, table.stop))
    taken.close()
    for step in (1, 2):
        train(plain, same_rule, again, step)
    assert_same(whole(table), whole(plain))
    taken = table.snapshot(tmp_path)
    assert_same(taken.read(range(table.start, table.stop)), whole(plain))
    for one in (table, plain):
        one.close()


def test_disk_files_are_committed_where_they_still_are_the_checkpoint(tmp_path: Path) -> None:
    table, rule = build(tmp_path, tier="disk")
    table.snapshot(tmp_path).close("a")
    assert table.committed == "a"
    taken = table.snapshot(tmp_path)
    train(table, rule, np.random.default_rng(0), 1)
    assert all(path.stat().st_size for path in tmp_path.rglob("*.undo"))
    taken.close("b")
    assert table.committed == ""
    # A resume takes "b", which the files are not: nothing is kept for "a", now or later.
    train(table, rule, np.random.default_rng(1), 2)
    assert not list(tmp_path.rglob("*.commit"))
    assert [path.stat().st_size for path in tmp_path.rglob("*.undo")] == [0, 0]
    table.snapshot(tmp_path).close()
    assert table.committed == ""
    table.snapshot(tmp_path).close("c")
    assert table.committed == "c"
    table.close()


def test_an_owner_of_nothing_has_an_empty_snapshot(tmp_path: Path) -> None:
    table = OwnedTable.create(TableSpec("t", 3, 2, (InitSegment(2, 0.1),)), owners=5, owner=4, seed=0)
    taken = table.snapshot(tmp_path, track_changes=True)
    assert table.start == table.stop and table.changed_rows == 0
    taken.close()
    assert len(table.snapshot(tmp_path, changed_only=True).positions) == 0
