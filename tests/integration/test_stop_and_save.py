"""The files STOP and SAVE: obeyed at one step on every rank; going on gives the undisturbed run's losses and bytes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from megamem.observe.journal import read_journal
from megamem_checkpoints.diff import compare_checkpoints
from megamem_checkpoints.reader import CheckpointReader

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
STEPS = 60


def command(folder: Path, data: Path) -> list[str]:
    settings = [
        f"runs_dir={folder}",
        f"data.path={data}",
        f"train.steps={STEPS}",
        "train.eval_batches=1",
        "train.log_interval=1000",
        "checkpoint.interval=1000",
        "checkpoint.keep=10",
        "tracking.mlflow=false",
        "parallel.nproc=2",
        "parallel.pipeline_model_parallel_size=2",
        "memory.prefetch_depth=2",
    ]
    return [sys.executable, "-m", "megamem.cli", "train", str(CONFIG), *settings]


def wait_until(holds, process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, f"training ended before {what}"
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)


def losses(run: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_journal(run / "journal.jsonl") if e["kind"] == "step"}


def test_save_then_stop_then_go_on(prepared_tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "disturbed" / "tiny"
    process = subprocess.Popen(
        command(run.parent, prepared_tiny), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    journal = run / "journal.jsonl"
    wait_until(lambda: journal.exists() and '"kind":"step"' in journal.read_text(), process, "the first step")
    (run / "SAVE").touch()
    wait_until(lambda: '"event":"checkpoint"' in journal.read_text(), process, "the save")
    wait_until(lambda: not (run / "SAVE").exists(), process, "the removal of SAVE")
    (run / "STOP").touch()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert not (run / "STOP").exists()

    events = {e["event"]: e for e in read_journal(journal) if e["kind"] == "event"}
    stopped = events["stop_requested"]["step"]
    assert 0 < stopped < STEPS
    assert "STOP" in events["stop_requested"]["text"]
    saved = sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    assert len(saved) == 2 and saved[-1] == stopped == max(losses(run))
    assert not (run / "summary.json").exists()

    for folder in (run.parent, tmp_path / "undisturbed"):
        result = subprocess.run(
            command(folder, prepared_tiny), capture_output=True, text=True, check=False, timeout=200
        )
        assert result.returncode == 0, result.stderr
    other = tmp_path / "undisturbed" / "tiny"
    assert losses(run) == losses(other)
    ends = [CheckpointReader(path / "checkpoints" / f"step_{STEPS:08d}") for path in (run, other)]
    assert compare_checkpoints(*ends).equal
