"""A rank that is stopped is named within the bound, every other one leaves its stacks, and training goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megamem.observe.journal import read_journal
from megamem_checkpoints.diff import compare_checkpoints
from megamem_checkpoints.reader import CheckpointReader
from megamem_launch.rundir import dump_dir, incarnations_file, live_dir, read_json, read_lines
from megamem_launch.watch.beats import Beat, read_beats
from megamem_launch.watch.watchdog import SLOW_PHASES

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
STEPS, INTERVAL, HANG_SECONDS = 96, 24, 10


def settings(folder: Path, data: Path) -> list[str]:
    return [
        str(CONFIG),
        f"runs_dir={folder}",
        f"data.path={data}",
        f"train.steps={STEPS}",
        "train.precision=fp32",
        "train.eval_batches=1",
        "train.eval_interval=0",
        f"checkpoint.interval={INTERVAL}",
        "memory.prefetch_depth=2",
        "tracking.mlflow=false",
        "parallel.nproc=2",
    ]


def steps(run_dir: Path) -> list[dict]:
    return [entry for entry in read_journal(run_dir / "journal.jsonl") if entry["kind"] == "step"]


def records(run_dir: Path, event: str) -> list[dict]:
    return [record for record in read_lines(incarnations_file(run_dir)) if record["event"] == event]


def wait_for_training(run_dir: Path, supervisor: subprocess.Popen) -> tuple[str, dict[int, Beat]]:
    """The incarnation and its heartbeats, once there is a checkpoint to go on from and two beats of each rank to time."""
    deadline = time.monotonic() + 150
    while True:
        assert supervisor.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
        started = records(run_dir, "start")
        if not started:
            continue
        beats = read_beats(live_dir(run_dir, started[-1]["incarnation"]))
        saved = (run_dir / "checkpoints" / "latest").exists()
        if saved and len(beats) == 2 and all(beat.step > beat.first_step > 0 for beat in beats.values()):
            return started[-1]["incarnation"], beats


@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells that a process is stopped")
def test_stopped_rank_is_named_and_the_run_goes_on(prepared_tiny: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "megamem.cli", "launch", "local", *settings(tmp_path / "hung", prepared_tiny)]
    run_dir, output = tmp_path / "hung" / "tiny", tmp_path / "supervisor.txt"
    with (
        output.open("w") as file,
        subprocess.Popen([*launch, f"--hang-seconds={HANG_SECONDS}"], stdout=file, stderr=file) as supervisor,
    ):
        try:
            incarnation, beats = wait_for_training(run_dir, supervisor)
            victim = beats[1]
            os.kill(victim.pid, signal.SIGSTOP)
            stopped = time.monotonic()
            dumps = dump_dir(run_dir, incarnation)
            while (verdict := read_json(dumps / "hang.json")) is None:
                assert supervisor.poll() is None
                assert time.monotonic() - stopped < 120
                time.sleep(0.05)
            took = time.monotonic() - stopped
            assert supervisor.wait(180) == 0, output.read_text()[-4000:]
        finally:
            if supervisor.poll() is None:
                supervisor.terminate()

    print(f"named {took:.1f} s after it stopped: {verdict['sentence']}")
    bound = HANG_SECONDS * max(SLOW_PHASES.get(rank["phase"], 1.0) for rank in verdict["ranks"])
    assert HANG_SECONDS - 1 < took < bound + 15  # a beat, a look, and stacks that settle
    assert verdict["late"] == [1]
    late = f"rank 1 ({victim.host}, pid {victim.pid}) is late: it is stopped (SIGSTOP) in phase "
    assert verdict["sentence"].startswith(late) and "while 1 rank waits in all_" in verdict["sentence"]
    assert "distributed_c10d.py" in (dumps / "rank-00000.txt").read_text()
    assert not (dumps / "rank-00001.txt").read_text()
    assert [rank["answered"] for rank in sorted(verdict["ranks"], key=lambda rank: rank["rank"])] == [True, False]

    ends = records(run_dir, "end")
    assert [end["outcome"] for end in ends] == ["hang", "finished"]
    assert ends[0]["reason"] == verdict["sentence"] and ends[0]["stragglers"]["steps"] > 0
    starts = records(run_dir, "start")
    assert [start["attempt"] for start in starts] == [0, 1] and starts[1]["step"] >= INTERVAL
    for beat in beats.values():
        assert not psutil.pid_exists(beat.pid) or psutil.Process(beat.pid).status() == psutil.STATUS_ZOMBIE

    train = [sys.executable, "-m", "megamem.cli", "train", *settings(tmp_path / "whole", prepared_tiny)]
    result = subprocess.run(train, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    whole, hung = steps(tmp_path / "whole" / "tiny"), steps(run_dir)
    assert [step["step"] for step in hung] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "grad_norm_tables", "lr"):
        assert [step[key] for step in whole] == [step[key] for step in hung], key
    checkpoint = Path("checkpoints") / f"step_{STEPS:08d}"
    one, other = CheckpointReader(tmp_path / "whole" / "tiny" / checkpoint), CheckpointReader(run_dir / checkpoint)
    assert one.step == other.step == STEPS
    found = compare_checkpoints(one, other)
    assert found.equal, found
    assert json.loads((run_dir / "launch" / "finished").read_text())["step"] == STEPS
