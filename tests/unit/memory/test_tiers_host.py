"""Tiers in memory: what is written is there, and a lack of room is an error before anything is used."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megamem.errors import TierError
from megamem.memory.tiers import resident
from megamem.memory.tiers.resources import TierResources
from megamem_kernels.formats import Field, row_fields

FIELDS = (*row_fields("fp8", 33), Field("exp_avg", torch.float32, (33,)), Field("last_step", torch.int32, ()))


def named_shared_memory() -> set[str]:
    """Files of /dev/shm that this process has mapped and that still have a name."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line[line.index("/dev/shm/") :] for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")}


@pytest.mark.parametrize("memory", ["private", "shared"])
@pytest.mark.parametrize("records", [0, 1, 70_001])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_records_are_zero_and_keep_what_is_written(tier: str, records: int, memory: str) -> None:
    before = named_shared_memory()
    store = TierResources(host_memory=memory).open(tier, "t", FIELDS, records)
    assert named_shared_memory() == before  # the name is gone before the memory is used
    assert {name: (array.dtype, array.shape) for name, array in store.arrays.items()} == {
        field.name: (field.dtype, (records, *field.shape)) for field in FIELDS
    }
    assert not any(array.view(torch.uint8).any() if array.dim() > 1 else array.any() for array in store.arrays.values())
    assert store.capacity >= max(1, records) and store.committed == ""
    assert store.resident_bytes().get("host", 0) == records * sum(field.nbytes for field in FIELDS)
    if records > 1:
        some = np.array([records - 1, 0])
        slots = store.locate(some, write=True)
        store.arrays["exp_avg"][slots] = torch.arange(66.0).view(2, 33)
        store.write(records - 1, {"last_step": torch.tensor([7], dtype=torch.int32)})
        copy = store.read(records - 2, records)
        assert copy["exp_avg"][1].tolist() == list(range(33)) and copy["last_step"].tolist() == [0, 7]
        copy["exp_avg"].zero_()
        assert store.arrays["exp_avg"][0, 0] == 33
    store.close()
    store.close()


def test_lack_of_memory_names_the_setting_and_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "available_host_bytes", lambda: 3 * 2**30)
    field = (Field("rows", torch.float32, (2**20,)),)
    with pytest.raises(
        TierError,
        match=r"t\.rows needs 4\.00 GiB of host memory and 3\.00 GiB are free in this machine.*memory.storage",
    ):
        TierResources().open("host", "t.rows", field, 1024)


def test_full_shared_memory_is_an_error_and_not_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "available_host_bytes", lambda: 2**63)
    free = os.statvfs("/dev/shm")
    rows = free.f_blocks * free.f_frsize // 2**20 + 1
    resources, field = TierResources(host_memory="shared"), (Field("rows", torch.uint8, (2**20,)),)
    with pytest.raises(TierError, match=r"GiB are free in /dev/shm; set .*memory.storage"):
        resources.open("host", "t", field, rows)

    def full(*_: int) -> None:  # others took the room meanwhile
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TierError, match=r"/dev/shm refuses \(No space left on device\).*memory.storage"):
        resources.open("host", "t", field, 1)


def test_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megamem.memory.tiers import limits

    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    group = tmp_path / own.lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    for name, text in {"max": "1000", "current": "700", "stat": "anon 400\nfile 300\nshmem 100\n"}.items():
        (group / f"memory.{name}").write_text(text)
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    assert limits.available_host_bytes() == 1000 - 700 + 200
