"""The command that trains on a CPU trains on a CUDA device, in bf16 through NCCL, with no setting changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamem.observe.journal import read_journal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"),
]
CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_training_and_export_on_a_cuda_device(precision: str, prepared_tiny: Path, tmp_path: Path) -> None:
    settings = [f"runs_dir={tmp_path}", f"data.path={prepared_tiny}", "tracking.mlflow=false"]
    settings.append(f"train.precision={precision}")

    def megamem(*words: str) -> None:
        command = [sys.executable, "-m", "megamem.cli", *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]

    megamem("train", str(CONFIG), *settings)
    run = tmp_path / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["device"] == torch.cuda.get_device_name()
    assert summary["precision"] == ("bf16" if precision == "auto" else "fp32")
    losses = [entry["loss"] for entry in read_journal(run / "journal.jsonl") if entry["kind"] == "step"]
    assert len(losses) == summary["steps"]
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0] - 0.3
    megamem("export", str(run), str(tmp_path / "out"))
