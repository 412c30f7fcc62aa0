"""When a run hangs, and who is blamed, on made-up heartbeats; and on real processes that are stopped, stuck or gone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamem_launch.watch.beats import Beat, parse_beat, read_beats
from megamem_launch.watch.dumps import HANG_FILE, collect
from megamem_launch.watch.process import state_here
from megamem_launch.watch.verdict import RankReport, judge
from megamem_launch.watch.watchdog import SLOW_PHASES, Hang, Watchdog

HANG, START = 30.0, 100.0


def write_beat(live: Path, rank: int, **changes) -> None:
    live.mkdir(exist_ok=True)
    record = {
        "beat": 1,
        "rank": rank,
        "host": f"node{rank // 2}",
        "pid": 4000 + rank,
        "start_tick": 77,
        "time": 0.0,  # of a clock that is wrong
        "step": 9,
        "first_step": 1,
        "phase": "forward",
        "sequence": 100,
        "idle_seconds": 0.0,
        "seconds": {"backward": 2.5},
        **changes,
    }
    (live / f"rank-{rank:05d}.json").write_text(json.dumps({**record, "end": record["beat"]}).ljust(2047) + "\n")


@pytest.fixture
def live(tmp_path) -> Path:
    return tmp_path / "live"


@pytest.fixture
def dog(live, tmp_path) -> Watchdog:
    return Watchdog(live, tmp_path / "dumps", 2, HANG, START)


def test_records_that_are_no_records_are_left_out(live):
    write_beat(live, 0)
    write_beat(live, 1)
    good = (live / "rank-00000.json").read_text()
    assert parse_beat(good) is not None
    torn = good.replace('"end": 1', '"end": 2')
    for broken in ("", good[:100], torn, "[]", "null", "{}", good.replace('"pid"', '"pit"')):
        assert parse_beat(broken) is None
    (live / "rank-00001.json").write_text(torn)
    (live / "control.json").write_text("{}")
    assert list(read_beats(live)) == [0]
    assert read_beats(live / "absent") == {}


def test_a_run_hangs_only_when_no_rank_gets_on(live, dog):
    for now in range(0, 200, 10):  # rank 1 waits all the time, rank 0 gets on
        write_beat(live, 0, beat=now + 1, sequence=100 + now)
        write_beat(live, 1, beat=now + 1)
        assert dog.check(now) is None
    for now in range(200, 220, 10):
        write_beat(live, 0, beat=now + 1, sequence=290)
        assert dog.check(now) is None
    write_beat(live, 0, beat=221, sequence=290)
    hang = dog.check(190 + HANG + 1)
    assert hang is not None and hang.kind == "stall" and hang.seconds == HANG + 1 and hang.missing == ()
    assert hang.silent == {0: 0.0, 1: 31.0}  # rank 1 last wrote at 190
    assert hang.beats[0].sequence == 290


def test_a_change_of_step_phase_or_process_is_progress(live, dog):
    for now, change in (
        (0, {}),
        (29, {"step": 10}),
        (58, {"phase": "backward"}),
        (87, {"pid": 1}),
        (116, {"sequence": 1}),
    ):
        write_beat(live, 0, **change)
        write_beat(live, 1)
        assert dog.check(now) is None
    assert dog.check(116 + HANG) is None
    assert dog.check(116 + HANG + 0.1) is not None


def test_a_record_met_half_written_is_no_news(live, dog):
    write_beat(live, 0)
    write_beat(live, 1)
    assert dog.check(0) is None
    (live / "rank-00001.json").write_text('{"beat": 5, "rank"')
    assert dog.check(20) is None
    assert dog.beats[1].beat == 1
    hang = dog.check(HANG + 1)
    assert hang is not None and set(hang.beats) == {0, 1}


def test_before_the_first_step_is_done_there_is_more_time(live, dog):
    assert dog.check(0) is None
    for step in (0, 5):  # setting up; then in the first step since the restart, the fifth of the run
        write_beat(live, 0, step=step, seconds={})
        write_beat(live, 1, step=step, seconds={})
        began = 10 * step
        assert dog.check(began) is None
        assert dog.check(began + HANG + 1) is None
    hang = dog.check(50 + START + 1)
    assert hang is not None and hang.kind == "stall"


@pytest.mark.parametrize("phase", sorted(SLOW_PHASES))
def test_slow_phases_have_more_time(live, dog, phase):
    write_beat(live, 0, phase=phase)
    write_beat(live, 1, phase="control")
    bound = HANG * SLOW_PHASES[phase]
    assert dog.check(0) is None and dog.check(bound) is None
    assert dog.check(bound + 1) is not None


def test_ranks_that_never_began_are_named(live, dog):
    assert dog.check(1000.0) is None  # the clock begins with the first look
    write_beat(live, 1, step=0, seconds={})
    assert dog.check(1000.0 + START) is None
    hang = dog.check(1001.0 + START)
    assert hang is not None and hang.kind == "start" and hang.missing == (0,)
    late, sentence = judge(hang, [])
    assert late == [0] and sentence.startswith("rank 0 gave no sign of life within 101 s, 1 others did")


def test_ranks_that_ended_give_no_bound_of_their_own(live, dog):
    write_beat(live, 0, phase="ended")
    write_beat(live, 1, phase="other")
    assert dog.check(0) is None and dog.check(HANG) is None
    assert dog.check(HANG + 1) is not None


def hang_of(reports: list[RankReport], seconds: float = 40.0) -> Hang:
    return Hang("stall", seconds, {}, {}, (), Path(), len(reports))


def report(rank: int, **changes) -> RankReport:
    waits = RankReport(
        rank=rank,
        host=f"node{rank // 2}",
        pid=4000 + rank,
        step=12,
        sequence=300,
        phase="other",
        idle_seconds=40.0,
        silent_seconds=0.4,
        answered=True,
        state="S",
        collective="all_reduce",
        caller="megamem/train/step.py:91 in _world_sum",
        stack=(),
    )
    return dataclasses.replace(waits, **changes)


OTHERS = ", while all 3 others wait in all_reduce called from megamem/train/step.py:91 in _world_sum"
MUTE = {"answered": False, "collective": None, "caller": None, "phase": "backward", "silent_seconds": 41.0}


@pytest.mark.parametrize(
    ("changes", "late", "sentence"),
    [
        (
            {3: {**MUTE, "state": "T"}},
            [3],
            f"rank 3 (node1, pid 4003) is late: it is stopped (SIGSTOP) in phase backward of step 12{OTHERS}",
        ),
        (
            {1: {**MUTE, "state": None}},
            [1],
            "rank 1 (node0, pid 4001) is late: it does not answer and gave no sign of life for 41 s in phase backward of step 12"
            + OTHERS,
        ),
        (
            {0: {"collective": None, "caller": "megamem/memory/engine.py:9 in take", "phase": "fetch_wait"}},
            [0],
            f"rank 0 (node0, pid 4000) is late: it is at megamem/memory/engine.py:9 in take in phase fetch_wait of step 12{OTHERS}",
        ),
        (
            {2: {"step": 11, "collective": "broadcast"}},
            [2],
            "rank 2 (node1, pid 4002) is late: it is behind, in broadcast",
        ),
        ({2: {"sequence": 299}}, [2], "rank 2 (node1, pid 4002) is late: it is behind, in all_reduce"),
        ({}, [], "no rank got on for 40 s: all 4 ranks wait in all_reduce called from"),
        # A process that is seen to be stopped outweighs one that only computes, or does not answer.
        (
            {0: {"collective": None}, 1: {**MUTE, "state": None}, 2: {**MUTE, "state": "D"}},
            [2],
            "rank 2 (node1, pid 4002) is",
        ),
        # Where no signal arrived anywhere that says nothing of anyone.
        (
            {rank: {**MUTE, "state": None, "step": 12 - (rank == 1)} for rank in range(4)},
            [1],
            "rank 1 (node0, pid 4001) is",
        ),
        # On an asynchronous device nobody is seen in a collective.
        (
            {rank: {"collective": None, "sequence": 300 - (rank == 3)} for rank in range(4)},
            [3],
            "rank 3 (node1, pid 4003) is",
        ),
        (
            {2: {"phase": "ended", "answered": False, "state": "gone"}},
            [],
            "no rank got on for 40 s: all 3 ranks wait in",
        ),
        ({rank: {"phase": "ended"} for rank in range(4)}, [], "all ranks came to their end 40 s ago"),
        (
            {rank: {**MUTE, "state": "gone"} for rank in range(4)},
            [0, 1, 2, 3],
            "4 ranks are late: rank 0 (node0, pid 4000) is gone",
        ),
        (
            {rank: {**MUTE, "state": "Z"} for rank in (1, 3)},
            [1, 3],
            "2 ranks are late: rank 1 (node0, pid 4001) has ended",
        ),
    ],
)
def test_the_late_rank_is_the_one_that_does_otherwise(changes, late, sentence):
    reports = [report(rank, **changes.get(rank, {})) for rank in range(4)]
    found, said = judge(hang_of(reports), reports)
    assert found == late
    assert said.startswith(sentence)


def test_stages_of_a_pipeline_enter_different_phases():
    reports = [report(rank, sequence=200 if rank < 2 else 500) for rank in range(4)]
    assert judge(hang_of(reports), reports, stages=2)[0] == []
    reports[2] = report(2, sequence=499)
    assert judge(hang_of(reports), reports, stages=2)[0] == [2]
    assert judge(hang_of(reports), reports)[0] == [0, 1]


def test_a_rank_alone_is_late_itself():
    alone = report(0, collective=None, caller="megamem_data/packing.py:9 in load", phase="data")
    found, said = judge(hang_of([alone]), [alone])
    assert found == [0]
    assert (
        said == "rank 0 (node0, pid 4000) is late: it is at megamem_data/packing.py:9 in load in phase data of step 12"
    )


def test_many_late_ranks_are_counted():
    reports = [report(rank, **(MUTE if rank else {}), state="D" if rank else "S") for rank in range(9)]
    found, said = judge(hang_of(reports), reports)
    assert found == list(range(1, 9))
    assert said.startswith("8 ranks are late: ") and "; and 4 more, while 1 rank waits in all_reduce" in said
    assert "rank 4 " in said and "rank 5 " not in said


RANK = """
import re, sys, time
from pathlib import Path
from megamem.observe.heartbeat import start_heartbeat
from megamem.observe.phases import phases
root, rank = Path(sys.argv[1]), int(sys.argv[2])
phases.step = 4
beats = start_heartbeat(root / "live", root / "dumps", rank, seconds=0.1)
phases.enter("backward")
def stuck():
    re.match("(a+)+b", "a" * 60)
def sleeping():
    time.sleep(600)
(root / f"begins-{rank}").touch()
stuck() if rank == 1 else sleeping()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_collect_from_stopped_stuck_and_lost_processes(tmp_path):
    """Stacks of those that answer, the kernel's word on those that do not; within the time that it takes to settle."""
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)]) for rank in range(4)]
    try:
        dog = Watchdog(tmp_path / "live", tmp_path / "dumps", 4, 0.5, 0.5)
        deadline = time.monotonic() + 30
        while (
            len(list(tmp_path.glob("begins-*"))) < 4
            or len(dog.beats) < 4
            or any(beat.phase != "backward" for rank, beat in dog.beats.items() if rank != 1)
        ):
            dog.check()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks[2].send_signal(signal.SIGSTOP)
        ranks[3].kill()
        ranks[3].wait()
        while (hang := dog.check()) is None or hang.silent[2] < 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert {rank: state_here(beat) for rank, beat in hang.beats.items()} == {0: "S", 1: "R", 2: "T", 3: "gone"}

        def signal_all():
            for process in ranks[:3]:
                process.send_signal(signal.SIGUSR2)

        began = time.monotonic()
        verdict = collect(hang, signal_all, timeout=20.0)
        assert time.monotonic() - began < 10
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert verdict.late == (2, 3) and verdict.nodes == (socket.gethostname(),)
    assert "is stopped (SIGSTOP)" in verdict.sentence and "is gone" in verdict.sentence
    kept = json.loads((tmp_path / "dumps" / HANG_FILE).read_text())
    assert kept["sentence"] == verdict.sentence and kept["kind"] == "stall" and kept["late"] == [2, 3]
    assert [entry["answered"] for entry in sorted(kept["ranks"], key=lambda entry: entry["rank"])] == [
        True,
        True,
        False,
        False,
    ]
    by_rank = {entry.rank: entry for entry in verdict.ranks}
    assert any("in sleeping" in frame for frame in by_rank[0].stack)
    assert any("in stuck" in frame for frame in by_rank[1].stack)  # its interpreter never lets another thread run


def test_a_verdict_is_given_though_nothing_works(tmp_path):
    """No signal can be sent, no state told, no file written."""
    write_beat(tmp_path / "live", 0, step=8)
    write_beat(tmp_path / "live", 1)
    beats = read_beats(tmp_path / "live")

    def signal_all():
        raise RuntimeError("the scheduler does not answer")

    for dumps in (tmp_path / "dumps", tmp_path / "live" / "rank-00000.json" / "no folder"):
        hang = Hang("stall", 40.0, beats, {0: 0.5, 1: 0.5}, (), dumps, 2)
        verdict = collect(hang, signal_all, timeout=0.1, state=lambda beat: None)
        assert verdict.late == (0,) and verdict.sentence.startswith("rank 0 (node0, pid 4000) is late: it is behind")
    kept = json.loads((tmp_path / "dumps" / HANG_FILE).read_text())
    assert kept["signal_problem"] == "RuntimeError: the scheduler does not answer"


def test_other_machines_are_asked_how_silent_ranks_are(tmp_path, monkeypatch):
    """Only of those; and a process of this machine that has the same number is left alone."""
    monkeypatch.setattr("megamem_launch.watch.dumps.py_spy", lambda pid: pytest.fail(f"{pid} is of another machine"))
    write_beat(tmp_path / "live", 0)
    write_beat(tmp_path / "live", 1)
    hang = Hang("stall", 40.0, read_beats(tmp_path / "live"), {0: 0.5, 1: 40.0}, (), tmp_path / "dumps", 2)
    asked = []

    def elsewhere(beats):
        asked.append([beat.rank for beat in beats])
        return {1: "D"}

    def signal_all():
        (tmp_path / "dumps").mkdir()
        (tmp_path / "dumps" / "rank-00000.txt").write_text("Current thread 0x1 (most recent call first):\n")

    verdict = collect(hang, signal_all, timeout=0.1, elsewhere=elsewhere)
    assert asked == [[1]] and verdict.late == (1,)
    assert "is late: it is in an uninterruptible sleep" in verdict.sentence


def test_state_of_another_host_or_a_later_process_is_not_this_one(tmp_path):
    write_beat(tmp_path, 0, pid=os.getpid(), host="elsewhere")
    write_beat(tmp_path, 1, pid=os.getpid(), host=socket.gethostname(), start_tick=1)
    beats: dict[int, Beat] = read_beats(tmp_path)
    assert state_here(beats[0]) is None
    assert state_here(beats[1]) == "gone"


def test_py_spy_looks_into_a_stopped_process(tmp_path, monkeypatch):
    """What stands in for py-spy prints what `py-spy dump --json` prints; whether it may look is the system's to say."""
    frames = [{"name": "forward", "filename": "/x/site-packages/megamem/models/norm.py", "line": 5}]
    text = json.dumps([{"thread_name": "MainThread", "frames": frames}])
    program = tmp_path / "py-spy"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/arguments\necho '{text}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    write_beat(tmp_path / "live", 0, host=socket.gethostname())
    hang = Hang("stall", 40.0, read_beats(tmp_path / "live"), {0: 40.0}, (), tmp_path / "dumps", 1)
    (tmp_path / "dumps").mkdir()
    verdict = collect(hang, lambda: None, timeout=1.0, state=lambda beat: "T")
    assert "is stopped (SIGSTOP) at megamem/models/norm.py:5 in forward" in verdict.sentence
    assert (tmp_path / "arguments").read_text().split() == ["dump", "--nonblocking", "--json", "--pid", "4000"]
    program.write_text("#!/bin/sh\nexit 1\n")  # ptrace is not permitted
    verdict = collect(hang, lambda: None, timeout=1.0, state=lambda beat: "T")
    assert "is stopped (SIGSTOP) in phase forward of step 9" in verdict.sentence
