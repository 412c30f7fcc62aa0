from __future__ import annotations

import json
import math
import resource
import signal

import numpy as np
import pytest
import torch

from megamem.errors import DataError
from megamem.observe.journal import Journal, read_journal
from megamem.observe.memory import memory_bytes


def _journal(path, entries):
    journal = Journal(path)
    for kind, step, values in entries:
        journal.write(kind, step, **values)
    journal.close()


def test_entries_come_back_in_order_with_plain_numbers(tmp_path):
    journal = Journal(tmp_path / "new" / "journal.jsonl")
    journal.start(0, world_size=4)
    written = journal.write(
        "step",
        0,
        loss=torch.tensor(2.5),
        norm=np.float32(0.5),
        tokens=np.int64(7),
        gates=np.array([[0.25, math.nan]]),
        skipped=False,
    )
    journal.event("checkpoint", 1, path=tmp_path)
    entries = read_journal(tmp_path / "new" / "journal.jsonl")  # readable while the run goes on
    assert [e["kind"] for e in entries] == ["event", "step", "event"]
    assert entries[1] == written
    assert entries[1]["loss"] == 2.5 and entries[1]["norm"] == 0.5 and entries[1]["tokens"] == 7
    assert entries[1]["gates"] == [[0.25, None]] and entries[1]["skipped"] is False
    assert entries[2] == entries[2] | {"event": "checkpoint", "path": str(tmp_path)}
    assert entries[0]["time"] <= entries[2]["time"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float64(math.inf)])
def test_numbers_that_are_not_finite_stay_valid_json(tmp_path, value):
    path = tmp_path / "journal.jsonl"
    _journal(path, [("step", 3, {"loss": value})])

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["loss"] is None


@pytest.mark.parametrize("torn", [b'{"time":1,"kind":"st', b'{"time":1,"kind":"step","step":2}', b"x" * 200_000])
def test_a_torn_last_line_is_ignored_and_then_replaced(tmp_path, torn):
    path = tmp_path / "journal.jsonl"
    _journal(path, [("step", 0, {}), ("step", 1, {})])
    with path.open("ab") as file:
        file.write(torn)
    assert [e["step"] for e in read_journal(path)] == [0, 1]
    _journal(path, [("step", 2, {"loss": 1.0})])
    assert [e["step"] for e in read_journal(path)] == [0, 1, 2]
    assert path.read_bytes().count(b"\n") == 3


def test_a_journal_that_holds_nothing_but_a_torn_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"time"')
    assert read_journal(path) == []
    _journal(path, [("step", 0, {})])
    assert [e["step"] for e in read_journal(path)] == [0]


def test_a_later_incarnation_overtakes_measurements_and_keeps_events(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    first.start(0)
    for step in range(6):
        first.write("step", step, loss=10.0 + step)
    first.event("checkpoint", 3)
    first.write("eval", 5, loss=1.0)
    first.close()
    second = Journal(path)
    second.start(3)
    for step in range(3, 5):
        second.write("step", step, loss=20.0 + step)
    second.close()
    entries = read_journal(path)
    assert [(e["step"], e["loss"]) for e in entries if e["kind"] == "step"] == [
        (0, 10.0), (1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)
    ]  # fmt: skip
    assert [(e["event"], e["step"]) for e in entries if e["kind"] == "event"] == [
        ("start", 0),
        ("checkpoint", 3),
        ("start", 3),
    ]
    assert not [e for e in entries if e["kind"] == "eval"]


def test_a_full_disk_loses_entries_and_neither_raises_nor_garbles(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write("step", 0, loss=1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))  # takes ten bytes of the next entry
    try:
        lost = [journal.write("step", step, loss=1.0) for step in (1, 2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    journal.write("step", 3, loss=1.0)
    journal.close()
    assert [entry["step"] for entry in lost] == [1, 2]
    assert [entry["step"] for entry in read_journal(path)] == [0, 3]
    assert [r.message for r in caplog.records if "measurements are lost until it can" in r.message] == [
        f"{path} cannot be written ([Errno 27] File too large): measurements are lost until it can"
    ]


@pytest.mark.parametrize("line", [b"\x00\x00\x00", b"[1]", b'{"kind":"step"}', b"12"])
def test_a_damaged_line_names_itself(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    _journal(path, [("step", 0, {})])
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=r"journal\.jsonl line 2 is damaged"):
        read_journal(path)


def test_a_missing_journal_is_an_error_of_the_user(tmp_path):
    with pytest.raises(DataError, match=r"journal\.jsonl cannot be read"):
        read_journal(tmp_path / "journal.jsonl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads the host where there is no CUDA device")
def test_memory_reading_sees_an_allocation():
    before = memory_bytes()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert memory_bytes() - before > 0.75 * block.nbytes
