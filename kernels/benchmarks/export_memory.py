"""Peak memory of an export against the size of the model: tables are streamed, so it must not grow with them.

Trains one step of a tiny model whose Engram table has the asked size, on the disk tier, and exports it; first, the same with a
table of some kilobytes. Peaks are the largest resident sets of the exporting process and of the one that reloads and checks the
export, mapped files included::

    megamem data prepare configs/tiny.yaml
    python kernels/benchmarks/export_memory.py --data data/tiny --gib 4
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
_WIDTH, _HEADS = 64, 4


@dataclass
class Arguments:
    """Export a model with a large table and report peak memory."""

    data: Path
    """Prepared data of configs/tiny.yaml."""
    gib: float = 4.0
    """Size of the table as it is stored."""
    format: Literal["fp32", "bf16", "fp8"] = "fp32"
    """How the run stores its rows."""
    table_files: int = 4
    """Weight files for the table."""
    folder: Path = Path("runs/bench/export")
    """Scratch; deleted at the end. It needs about three times the size of the table."""
    out: str = ""
    """JSON file for the results; empty for none."""


def main(arguments: Arguments) -> None:
    """Measure both exports and print the difference."""
    small, large = (measure(arguments, gib) for gib in (0.0, arguments.gib))
    result = {
        "table_gib": large["table_bytes"] / 2**30,
        "format": arguments.format,
        "peak_mib_without": small["peak_mib"],
        "peak_mib": large["peak_mib"],
        "above_baseline_mib": large["peak_mib"] - small["peak_mib"],
        "seconds": large["seconds"],
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(arguments: Arguments, gib: float) -> dict[str, float]:
    """Peak resident set in MiB, seconds and bytes of the table's files, for the export of a table of ``gib``."""
    row_bytes = _WIDTH * {"fp32": 4, "bf16": 2, "fp8": 1}[arguments.format]
    rows = max(101, int(gib * 2**30 / (row_bytes * _HEADS)))
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    run, out = arguments.folder / "run", arguments.folder / "out"
    settings = [
        f"runs_dir={arguments.folder.resolve()}",
        "name=run",
        f"data.path={arguments.data.resolve()}",
        "train.steps=1",
        "optimizer.warmup_steps=0",
        "train.eval_batches=0",
        "tracking.mlflow=false",
        "memory.bank.units=[]",
        f"memory.engram={{layers: [1], orders: [2, 3], heads: {_HEADS // 2}, width: {_WIDTH}, rows_per_head: {rows}}}",
        f"memory.storage={{tier: disk, format: {arguments.format}}}",
        "memory.optimizer.name=sgd",
    ]
    try:
        megamem("train", str(_CONFIG), *settings)
        shutil.rmtree(run / "tiers", ignore_errors=True)  # the disk tier's own files
        start = time.monotonic()
        peak = megamem("export", str(run), str(out), "--table-files", str(arguments.table_files))
        seconds = time.monotonic() - start
        weight_map = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        files = {file for name, file in weight_map.items() if ".shard_" in name}
        return {"peak_mib": peak, "seconds": seconds, "table_bytes": sum((out / f).stat().st_size for f in files)}
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def megamem(*words: str) -> float:
    """Run a verb; the largest resident set, in MiB, of its process and of those that it started."""
    process = subprocess.Popen([sys.executable, "-m", "megamem.cli", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"megamem {words[0]} failed")
    return usage.ru_maxrss / 2**10


if __name__ == "__main__":
    main(tyro.cli(Arguments))
