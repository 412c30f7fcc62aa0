"""The disk tier: equal to memory bit for bit, bounded, and at its last commit after a kill at any moment."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamem.errors import TierError
from megamem.memory.config import DiskConfig, StorageConfig
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem.memory.tiers.base import RowStore, record_bytes
from megamem.memory.tiers.disk import DiskStore, committed_label
from megamem.memory.tiers.journal import UndoJournal
from megamem.memory.tiers.resident import open_host
from megamem.memory.tiers.resources import TierResources
from megamem_kernels.formats import Field

FIELDS = (
    Field("rows", torch.float8_e4m3fn, (33,)),
    Field("scales", torch.uint8, (2,)),
    Field("exp_avg", torch.float32, (5,)),
    Field("last_step", torch.int32, ()),
)
RECORDS = 400


def open_disk(path: Path, *, records: int = RECORDS, slots: int = 50, resume: str = "") -> DiskStore:
    size = record_bytes(FIELDS) + 18
    return DiskStore(path / "t", FIELDS, records, cache_bytes=slots * size, queue_depth=4, resume=resume)


def random_values(generator: np.random.Generator, count: int) -> dict[str, Tensor]:
    return {
        field.name: torch.from_numpy(generator.integers(0, 256, (count, field.nbytes), dtype=np.uint8))
        .view(field.dtype)
        .view(count, *field.shape)
        for field in FIELDS
    }


def put(store: RowStore, records: np.ndarray, values: dict[str, Tensor]) -> None:
    slots = torch.from_numpy(store.locate(records, write=True))
    for name, value in values.items():
        as_bytes(store.arrays[name])[slots] = as_bytes(value)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1).view(torch.uint8)


def same(store: RowStore, other: RowStore) -> bool:
    mine, theirs = store.read(0, store.records), other.read(0, other.records)
    return all(torch.equal(as_bytes(mine[name]), as_bytes(theirs[name])) for name in mine)


def random_step(store: RowStore, seed: int) -> None:
    """One of the things that are done to a store, the same for any tier."""
    generator = np.random.default_rng(seed)
    if generator.random() < 0.2:
        start = int(generator.integers(0, store.records))
        values = random_values(generator, int(generator.integers(1, store.records - start + 1)))
        if generator.random() < 0.5:
            del values["exp_avg"]
        store.write(start, values)
    else:
        count = int(generator.integers(1, 51))
        records = generator.choice(store.records, count, replace=False)
        put(store, records, random_values(generator, count))


@settings(max_examples=40, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**32), max_size=12), slots=st.sampled_from([50, 53, 399, 1000]))
def test_any_sequence_gives_what_memory_gives(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], slots: int
) -> None:
    disk = open_disk(tmp_path_factory.mktemp("disk"), slots=slots)
    host = open_host("t", FIELDS, RECORDS, kind="private", pin=False)
    assert disk.capacity == min(slots, RECORDS)
    for index, seed in enumerate(seeds):
        for store in (disk, host):
            random_step(store, seed)
        asked = np.random.default_rng(seed).integers(0, RECORDS, 50)
        disk_slots, host_slots = disk.locate(asked, write=False), host.locate(asked, write=False)
        for name in disk.arrays:
            found = as_bytes(disk.arrays[name])[torch.from_numpy(disk_slots)]
            assert torch.equal(found, as_bytes(host.arrays[name])[torch.from_numpy(host_slots)])
        if index % 3 == 2:
            disk.commit(str(index))
            assert disk.committed == str(index)
    assert same(disk, host)
    disk.close()


def test_what_is_committed_is_found_again_and_nothing_else(tmp_path: Path) -> None:
    first = open_disk(tmp_path)
    for seed in range(5):
        random_step(first, seed)
    assert first.committed == ""
    first.commit("step 5")
    expected = first.read(0, RECORDS)
    random_step(first, 6)
    assert first.committed == ""
    first.close()

    again = open_disk(tmp_path, resume="step 5")
    assert again.committed == committed_label(tmp_path / "t") == "step 5"
    assert all(torch.equal(as_bytes(again.read(0, RECORDS)[name]), as_bytes(expected[name])) for name in expected)
    again.close()
    other = open_disk(tmp_path, resume="step 4")
    assert other.committed == "" and not any(as_bytes(tensor).any() for tensor in other.read(0, RECORDS).values())
    other.close()
    assert not list(tmp_path.iterdir())


def test_what_is_given_up_is_not_found_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, undo = open_disk(tmp_path), tmp_path / "t.undo"
    store.commit("step 5")
    random_step(store, 6)
    assert undo.stat().st_size > 0
    with monkeypatch.context() as patch:  # killed in between, the rest of the journal must not be taken for all of it
        patch.setattr(UndoJournal, "clear", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.commit("")
    assert committed_label(tmp_path / "t") == ""
    store.commit("")
    for seed in range(7, 12):
        random_step(store, seed)
    assert undo.stat().st_size == 0 and store.committed == ""
    store.commit("step 9")
    random_step(store, 13)
    assert undo.stat().st_size > 0 and committed_label(tmp_path / "t") == "step 9"
    store.close()


@pytest.mark.parametrize("change", [("boot", "another"), ("records", 399), ("label", "step 6"), ("fields", [])])
def test_a_commit_of_something_else_is_not_taken(tmp_path: Path, change: tuple[str, object]) -> None:
    store = open_disk(tmp_path)
    random_step(store, 1)
    store.commit("step 5")
    store.close()
    path = tmp_path / "t.commit"
    path.write_text(json.dumps({**json.loads(path.read_text()), change[0]: change[1]}))
    again = open_disk(tmp_path, resume="step 5")
    assert again.committed == "" and not any(as_bytes(tensor).any() for tensor in again.read(0, RECORDS).values())
    again.close()


def update_until_killed(folder: Path, pause: float, ready: int) -> None:
    """Update at random and commit now and then; every number is a function of the step."""
    label = committed_label(folder / "t")
    store = open_disk(folder, resume=label)
    assert store.committed == label
    step = int(label or 0)
    os.write(ready, b"1")
    while True:
        step += 1
        random_step(store, step)
        if step % 7 == 0:
            store.commit(str(step))
        time.sleep(pause)


def test_killed_at_any_moment_it_is_at_its_last_commit(tmp_path: Path) -> None:
    """The same file is killed again and again, and taken up again where it was committed."""
    (tmp_path / "warm").mkdir()
    compiled = open_disk(tmp_path / "warm")  # what is killed should be updates, and not the compiler
    random_step(compiled, 1)
    compiled.close()
    moments, labels, kills = random.Random(0), set(), 0
    while kills < 40 or (len(labels) <= 10 and kills < 400):  # a slow disk commits little between two kills
        kills += 1
        heard, ready = os.pipe()
        process = os.fork()
        if not process:
            try:
                update_until_killed(tmp_path, moments.choice([0.0, 0.002]), ready)
            finally:
                os._exit(1)
        os.close(ready)
        assert os.read(heard, 1) == b"1"
        os.close(heard)
        time.sleep(moments.random() * 0.1)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        labels.add(committed_label(tmp_path / "t"))
    last = committed_label(tmp_path / "t")
    assert len(labels) > 10
    host = open_host("t", FIELDS, RECORDS, kind="private", pin=False)
    for step in range(1, int(last) + 1):
        random_step(host, step)
    disk = open_disk(tmp_path, resume=last)
    assert disk.committed == last and same(disk, host)
    disk.close()


@pytest.mark.parametrize("crash_after", range(6))
def test_killed_inside_a_commit(tmp_path: Path, crash_after: int) -> None:
    """Stops after each of the system calls of a commit that change anything."""
    store = open_disk(tmp_path)
    random_step(store, 3)
    store.commit("old")
    old = store.read(0, RECORDS)
    random_step(store, 4)
    new = store.read(0, RECORDS)
    store.close()
    pid = os.fork()
    if not pid:
        try:
            again = open_disk(tmp_path, resume="old")
            random_step(again, 4)
            _crash_after(crash_after, again)
            again.commit("new")
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] != 0
    label = committed_label(tmp_path / "t")
    assert label == ("old" if crash_after < 4 else "new")
    reopened = open_disk(tmp_path, resume=label).read(0, RECORDS)
    expected = old if label == "old" else new
    assert all(torch.equal(as_bytes(reopened[name]), as_bytes(expected[name])) for name in expected)


def _crash_after(count: int, store: DiskStore) -> None:
    from megamem.memory.tiers import disk

    calls = [0]

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args: object, **kwargs: object) -> object:
            if calls[0] == count:
                os._exit(9)
            calls[0] += 1
            return function(*args, **kwargs)

        return call

    store._file.transfer = counted(store._file.transfer)  # type: ignore[method-assign]
    store._file.synchronize = counted(store._file.synchronize)  # type: ignore[method-assign]
    disk._boot_id = counted(disk._boot_id)
    disk.write_text = counted(disk.write_text)
    store._journal.clear = counted(store._journal.clear)  # type: ignore[method-assign, union-attr]


def test_a_broken_end_of_the_journal_is_not_acted_on(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    random_step(store, 3)
    store.commit("a")
    expected = store.read(0, RECORDS)
    put(store, np.arange(20), random_values(np.random.default_rng(0), 20))
    store.close()
    journal = tmp_path / "t.undo"
    whole = journal.read_bytes()
    for broken in (b"x" * 40, whole[:-3], whole[:20], whole[:100] + b"\0" + whole[101:]):
        # The second batch of a kill in the middle of writing it: nothing had been overwritten on its account.
        journal.write_bytes(whole + broken)
        again = open_disk(tmp_path, resume="a")
        assert all(torch.equal(as_bytes(again.read(0, RECORDS)[n]), as_bytes(expected[n])) for n in expected)
        assert journal.stat().st_size == 0
        again.close()


def test_truncated_files_are_named(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    random_step(store, 3)
    store.commit("a")
    os.truncate(tmp_path / "t.rec", 1000)
    with pytest.raises(
        TierError, match=r"t\.rec is 1000 bytes long in place of 23600.*delete it and resume from the last"
    ):
        for first in range(0, RECORDS, 50):
            store.locate(np.arange(first, first + 50), write=False)
    with pytest.raises(TierError, match=r"truncated"):
        store.read(0, RECORDS)
    store.close()
    with pytest.raises(TierError, match=r"t\.rec is 1000 bytes long in place of 23600"):
        open_disk(tmp_path, resume="a")


def test_a_truncated_file_does_not_grow_again(tmp_path: Path) -> None:
    """Changed records of the cache are written back behind the end that the file has now."""
    store = open_disk(tmp_path)
    last = np.arange(RECORDS - 50, RECORDS)
    store.locate(last, write=True)
    os.truncate(tmp_path / "t.rec", 1000)
    with pytest.raises(TierError, match=r"t\.rec is 1000 bytes long in place of 23600"):
        for first in range(0, RECORDS - 50, 50):
            store.locate(np.arange(first, first + 50), write=False)
    with pytest.raises(TierError, match=r"truncated"):
        store.commit("a")
    assert (tmp_path / "t.rec").stat().st_size == 1000
    store.close()


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: first no room for the table, then none for the journal."""
    store = open_disk(tmp_path)
    store.write(0, random_values(np.random.default_rng(0), RECORDS))
    store.commit("a")
    expected = store.read(0, RECORDS)
    store.close()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (23_600, before[1]))
        again = open_disk(tmp_path, resume="a")
        with pytest.raises(TierError, match=r"t\.undo: File too large.*resume from the last checkpoint"):
            for first in range(0, RECORDS, 40):
                put(again, np.arange(first, first + 40), random_values(np.random.default_rng(first), 40))
        again.close()
        with pytest.raises(TierError, match=r"other\.rec: File too large \(0\.00 GiB are needed\).*memory.disk.path"):
            DiskStore(tmp_path / "other", FIELDS, RECORDS + 1, cache_bytes=9999, queue_depth=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = open_disk(tmp_path, resume="a")
    assert all(torch.equal(as_bytes(again.read(0, RECORDS)[name]), as_bytes(expected[name])) for name in expected)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    with pytest.raises(TierError, match=r"another process uses .*t\.rec; stop it, or set another memory.disk.path"):
        open_disk(tmp_path)
    store.close()
    open_disk(tmp_path).close()


def test_a_path_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match=r"file.*memory.disk.path"):
        open_disk(tmp_path / "file")
    with pytest.raises(TierError, match=r"has no directory; set memory.disk.path"):
        TierResources().open("disk", "t", FIELDS, 1)


def test_the_cache_is_shared_by_size_and_keeps_what_is_used(tmp_path: Path) -> None:
    resources = TierResources(disk_root=tmp_path, disk=DiskConfig(cache_gib=64 / 2**20), disk_bytes=4 * 59 * 1000)
    store = resources.open("disk", "t", FIELDS, 1000)
    assert store.capacity == 64 * 1024 // 4 // (59 + 18)
    assert isinstance(store, DiskStore)
    hot = np.arange(10)
    generator = np.random.default_rng(0)
    for _ in range(50):
        store.locate(np.concatenate([hot, generator.choice(np.arange(10, 1000), 100, replace=False)]), write=False)
    assert (store._slot_of[hot] >= 0).all()
    assert store.resident_bytes()["disk"] == 59_000
    store.close()
    store.close()


def test_files_of_another_number_of_owners_are_deleted_unless_they_are_in_use(tmp_path: Path) -> None:
    spec = TableSpec("a.table", 40, 3, (InitSegment(3, 0.5),))
    resources = TierResources(disk_root=tmp_path)
    disk = StorageConfig(tier="disk")
    left = OwnedTable.create(spec, owners=2, owner=0, seed=1, storage=disk, resources=resources)
    used = OwnedTable.create(spec, owners=2, owner=1, seed=1, storage=disk, resources=resources)
    other = OwnedTable.create(
        TableSpec("a.table.b", 40, 3, spec.init), owners=2, owner=0, seed=1, storage=disk, resources=resources
    )
    left.commit("step 1")
    left.close()
    now = OwnedTable.create(spec, owners=1, owner=0, seed=1, storage=disk, resources=resources)
    names = {path.name for path in tmp_path.iterdir()}
    assert not any(name.startswith("a.table.0-of-2") for name in names)
    assert {"a.table.1-of-2.rows.rec", "a.table.0-of-1.rows.rec", "a.table.b.0-of-2.rows.rec"} <= names
    for table in (now, used, other):
        table.close()
