"""SIGKILL at a random step, resume: losses and every byte of the final state equal the undisturbed run's."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamem.observe.journal import read_journal
from megamem_checkpoints.diff import compare_checkpoints
from megamem_checkpoints.reader import CheckpointReader
from megamem_launch.quickstart import kill_family

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
STEPS, INTERVAL = 16, 4


def command(folder: Path, data: Path, extra: list[str]) -> list[str]:
    settings = [
        f"runs_dir={folder}",
        f"data.path={data}",
        f"train.steps={STEPS}",
        "train.precision=fp32",
        "train.eval_batches=1",
        "train.eval_interval=8",
        f"checkpoint.interval={INTERVAL}",
        "tracking.mlflow=false",
        "model.moe.router=sigmoid_bias",
        *extra,
    ]
    return [sys.executable, "-m", "megamem.cli", "train", str(CONFIG), *settings]


def steps(run_dir: Path) -> list[dict]:
    journal = run_dir / "journal.jsonl"
    return [entry for entry in read_journal(journal) if entry["kind"] == "step"] if journal.exists() else []


def train(folder: Path, data: Path, extra: list[str]) -> None:
    result = subprocess.run(command(folder, data, extra), capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]


def kill_at(step: int, folder: Path, data: Path, extra: list[str]) -> None:
    process = subprocess.Popen(
        command(folder, data, extra),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 200
        while len(steps(folder / "tiny")) < step:
            assert process.poll() is None, "training ended before it was killed"
            assert time.monotonic() < deadline, "training did not reach the step"
            time.sleep(0.02)
    finally:
        kill_family(process)


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    a, b = CheckpointReader(one), CheckpointReader(other)
    assert a.step == b.step == STEPS
    assert a.names() and a.tables()
    found = compare_checkpoints(a, b)
    assert found.equal, found


FORMS: dict[str, tuple[list[str], list[str]]] = {
    "one-process": ([], []),
    "dp2-ep2": (
        ["parallel.nproc=2", "parallel.expert_model_parallel_size=2", "memory.optimizer.name=rowwise_adagrad"],
        [],
    ),
    # The killed run keeps its rows elsewhere and fetches them further ahead: that may change nothing either.
    "prefetch-3-disk": (["memory.prefetch_depth=0"], ["memory.prefetch_depth=3", "memory.storage.tier=disk"]),
    "bf16-rows-state-on-disk": (
        ["memory.storage.format=bf16"],
        ["memory.storage.state_tier=disk", "memory.host_memory=shared"],
    ),
}


QUICK = "prefetch-3-disk"
"""What `make test` has time for; its test_stop_and_save and tests/slurm resume plain runs, and those of several ranks."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in FORMS]
)
def test_killed_and_resumed_run_is_bit_identical(name: str, prepared_tiny: Path, tmp_path: Path) -> None:
    extra, killed_extra = FORMS[name]
    step = random.SystemRandom().randint(INTERVAL + 1, STEPS - 4)
    print(f"killed once step {step} is done")
    train(tmp_path / "whole", prepared_tiny, extra)
    kill_at(step, tmp_path / "killed", prepared_tiny, [*extra, *killed_extra])
    assert not (tmp_path / "killed" / "tiny" / "summary.json").exists()
    train(tmp_path / "killed", prepared_tiny, [*extra, *killed_extra])

    whole, killed = steps(tmp_path / "whole" / "tiny"), steps(tmp_path / "killed" / "tiny")
    assert [s["step"] for s in whole] == [s["step"] for s in killed] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "grad_norm_tables", "lr"):
        assert [s[key] for s in whole] == [s[key] for s in killed], key
    checkpoint = Path("tiny") / "checkpoints" / f"step_{STEPS:08d}"
    assert_equal_checkpoints(tmp_path / "whole" / checkpoint, tmp_path / "killed" / checkpoint)
