from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamem.observe.heartbeat import Heartbeat, start_tick
from megamem.observe.phases import NAMES, Phases


def record(path: Path) -> dict:
    while True:  # until it is not met half written
        try:
            value = json.loads(path.read_text())
        except ValueError:
            continue
        if value["beat"] == value["end"]:
            return value


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_record_says_who_writes_and_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAMEM_INCARNATION", "7.0.1")
    marks, path = Phases(), tmp_path / "rank-00003.json"
    heart = Heartbeat(path, 3, marks, seconds=0.01)
    first = record(path)  # there is one from the start
    assert (first["rank"], first["pid"], first["incarnation"]) == (3, os.getpid(), "7.0.1")
    assert first["start_tick"] == start_tick(os.getpid()) > 0
    assert (first["step"], first["first_step"], first["phase"], first["sequence"]) == (0, 0, "other", 0)
    marks.step = 12
    with marks("backward"):
        wait_for(lambda: record(path)["phase"] == "backward" and record(path)["idle_seconds"] > 0.05)
        now = record(path)
        assert (now["step"], now["first_step"], now["sequence"]) == (12, 12, 1) and now["beat"] > first["beat"]
        assert abs(now["time"] - time.time()) < 5
    heart.close()
    assert record(path)["phase"] == "ended"
    last = path.stat().st_mtime_ns
    time.sleep(0.05)
    assert path.stat().st_mtime_ns == last


def test_seconds_count_from_the_step_that_was_seen_first(tmp_path):
    marks, path = Phases(), tmp_path / "rank-00000.json"
    heart = Heartbeat(path, 0, marks, seconds=0.01)
    with marks("forward"):  # the first step compiles
        time.sleep(0.5)
    marks.take()
    marks.step = 5
    wait_for(lambda: record(path)["first_step"] == 5)
    with marks("forward"):
        time.sleep(0.03)
    marks.take()
    marks.step = 6
    heart.close()
    last = record(path)
    assert (last["first_step"], last["step"]) == (5, 6)
    assert 0.03 <= last["seconds"]["forward"] < 0.5


def test_reads_meet_whole_records_of_one_size(tmp_path):
    path, marks = tmp_path / "rank-00000.json", Phases()
    heart = Heartbeat(path, 0, marks, seconds=0.0)  # as fast as it can
    sizes, beats, reads, torn = set(), set(), 0, 0
    deadline = time.monotonic() + 30
    while len(beats) < 30:
        assert time.monotonic() < deadline
        text = path.read_text()
        sizes.add(len(text))
        reads += 1
        try:
            value = json.loads(text)
            torn += value["beat"] != value["end"]
            beats.add(value["beat"])
        except ValueError:
            torn += 1
    heart.close()
    assert sizes == {2048}
    assert torn <= reads / 10


def test_record_grows_in_whole_pieces_and_never_shrinks(tmp_path):
    marks, path = Phases(), tmp_path / "rank-00000.json"
    marks.step = 1
    heart = Heartbeat(path, 0, marks, seconds=0.01)
    for index in range(120):
        with marks(f"phase_with_a_long_name_{index}"):
            pass
    marks.take()
    wait_for(lambda: len(record(path)["seconds"]) > 120)
    assert path.stat().st_size % 2048 == 0 and path.stat().st_size > 2048
    heart.close()


def test_a_file_system_that_refuses_is_told_once_and_tried_again(tmp_path, capfd):
    folder = tmp_path / "live"
    folder.mkdir()
    heart = Heartbeat(folder / "rank-00000.json", 0, Phases(), seconds=0.01)
    kept = (folder / "rank-00000.json").read_text()
    shutil.rmtree(folder)
    wait_for(lambda: heart._told)
    folder.mkdir()
    (folder / "rank-00000.json").write_text(kept)
    wait_for(lambda: (folder / "rank-00000.json").read_text() != kept)
    heart.close()
    assert capfd.readouterr().err.count("could not be written") == 1


STUCK = """
import re, sys
from pathlib import Path
from megamem.observe.heartbeat import start_heartbeat
root = Path(sys.argv[1])
start_heartbeat(root / "live", root / "dumps", 2, seconds=0.05)
(root / "spins").touch()
def spin():
    re.match("(a+)+b", "a" * 60)  # for hours, and without ever letting another thread run
spin()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals to a thread that holds the interpreter")
def test_an_interpreter_that_is_stuck_falls_silent_but_gives_its_stacks(tmp_path):
    path, dump = tmp_path / "live" / "rank-00002.json", tmp_path / "dumps" / "rank-00002.txt"
    with subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path)]) as process:
        try:
            wait_for((tmp_path / "spins").exists)
            time.sleep(0.3)
            silent = path.read_text()
            time.sleep(0.3)
            assert path.read_text() == silent
            process.send_signal(signal.SIGUSR2)
            wait_for(lambda: dump.exists() and "<module>" in dump.read_text())
            assert process.poll() is None
        finally:
            process.kill()
    text = dump.read_text()
    assert "in spin" in text and "heartbeat.py" in text


def test_a_beat_costs_a_small_part_of_a_second(tmp_path):
    marks, path = Phases(), tmp_path / "rank-00000.json"
    for name in NAMES:
        with marks(name):
            pass
    marks.take()
    marks.step = 1
    began = time.process_time()
    heart = Heartbeat(path, 0, marks, seconds=0.0)
    time.sleep(0.5)
    heart.close()
    seconds = (time.process_time() - began) / record(path)["beat"]
    print(f"{seconds * 1e6:.0f} us of processor time per beat")
    assert seconds < 1e-3  # of the second between two
