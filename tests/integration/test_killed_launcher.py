"""A launcher that is killed takes its ranks along: none trains on and keeps the lock of the run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ranks_end_with_their_launcher(prepared_tiny: Path, tmp_path: Path) -> None:
    settings = [
        f"runs_dir={tmp_path}",
        f"data.path={prepared_tiny}",
        "name=r",
        "parallel.nproc=2",
        "train.steps=100000",
    ]
    command = [sys.executable, "-m", "megamem.cli", "train", str(TINY), *settings, "tracking.mlflow=false"]
    journal = tmp_path / "r" / "journal.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        deadline = time.monotonic() + 200
        while not journal.exists() or "grad_norm" not in journal.read_text():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        ranks = [
            child for child in psutil.Process(launcher.pid).children() if "megamem_launch.pretrain" in child.cmdline()
        ]
        assert len(ranks) == 2
        launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
