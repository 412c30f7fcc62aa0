"""What breaks under a run ends in one clear sentence, soon, and the last checkpoint stays whole."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megamem.observe.journal import read_journal
from megamem_checkpoints.directory import latest
from megamem_checkpoints.reader import CheckpointReader
from megamem_launch.quickstart import kill_family

INTERVAL = 4
CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
BOUND = 120
"""Seconds within which a broken run must have ended, on a busy machine."""


def start(folder: Path, data: Path, *extra: str, limit: int | None = None) -> subprocess.Popen[str]:
    def before() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "megamem.cli",
            "train",
            str(CONFIG),
            f"runs_dir={folder}",
            f"data.path={data}",
            "train.steps=500",
            "train.eval_batches=0",
            f"checkpoint.interval={INTERVAL}",
            "tracking.mlflow=false",
            *extra,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=before,
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the step is done and, from the first interval on, a checkpoint is whole: saves go on in the background."""
    deadline = time.monotonic() + 200
    while True:
        journal = run / "journal.jsonl"
        done = journal.exists() and sum(entry["kind"] == "step" for entry in read_journal(journal)) >= step
        if done and (step < INTERVAL or (run / "checkpoints" / "latest").exists()):
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> str:
    try:
        output = process.communicate(timeout=BOUND)[0]
    finally:
        kill_family(process)
    assert process.returncode != 0
    return output


def assert_last_checkpoint_is_whole(run: Path) -> None:
    path = latest(run / "checkpoints")
    assert path is not None
    CheckpointReader(path).verify()


def test_killed_owner(prepared_tiny: Path, tmp_path: Path) -> None:
    process = start(tmp_path, prepared_tiny, "parallel.nproc=2")
    wait_for_step(process, tmp_path / "tiny", 6)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get("RANK") == "1"
    ]
    assert ranks
    os.kill(ranks[0].pid, signal.SIGKILL)
    ended(process)
    assert_last_checkpoint_is_whole(tmp_path / "tiny")


def test_tier_file_that_is_cut_short_under_a_run(prepared_tiny: Path, tmp_path: Path) -> None:
    process = start(tmp_path, prepared_tiny, "memory.storage.tier=disk", "memory.disk.cache_gib=1e-5")
    wait_for_step(process, tmp_path / "tiny", 6)
    (victim,) = (tmp_path / "tiny" / "tiers").glob("decoder.layers.1.engram.table.*.rows.rec")
    os.truncate(victim, victim.stat().st_size // 2)
    output = ended(process)
    assert str(victim) in output and "truncated" in output and "Traceback" not in output, output[-3000:]
    assert_last_checkpoint_is_whole(tmp_path / "tiny")


def test_disk_that_is_too_small_for_a_table(prepared_tiny: Path, tmp_path: Path) -> None:
    process = start(tmp_path, prepared_tiny, "memory.storage.tier=disk", limit=10_000)
    output = ended(process)
    assert "decoder.layers.1.engram.table" in output and "memory.disk.path" in output, output[-3000:]
    assert "Traceback" not in output
    assert not list((tmp_path / "tiny").glob("checkpoints/step_*"))


def test_another_process_may_not_use_the_files_of_a_run(prepared_tiny: Path, tmp_path: Path) -> None:
    common = ["memory.storage.tier=disk", f"memory.disk.path={tmp_path / 'disk'}"]
    first = start(tmp_path / "a", prepared_tiny, *common)
    try:
        wait_for_step(first, tmp_path / "a" / "tiny", 1)
        output = ended(start(tmp_path / "b", prepared_tiny, *common))
    finally:
        kill_family(first)
        first.communicate()
    assert "another process uses" in output and "memory.disk.path" in output, output[-3000:]
    assert "Traceback" not in output
