"""``megamem profile --ceilings``: how fast this machine does what a training step consists of."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megamem.config import build, to_dict
from megamem.errors import ConfigError
from megamem.files import write_text
from megamem_launch.plan.hardware import CeilingsConfig, HardwareConfig, RankCeilings
from megamem_launch.plan.machine import local_hardware
from megamem_launch.plan.reference import train_reference
from megamem_launch.torchrun import run_ranks
from megamem_launch.verbs.parse import parse

_SIGNIFICANT = 4


@dataclass
class Arguments:
    """Measure what this machine reaches: products, element-wise operations, copies, rows, collectives, disk.

    Takes about three minutes, on a machine that does nothing else, and ends with training a small model. Prints a ``hardware``
    section, whose ``ceilings`` `megamem plan` estimates from; paste it into a cluster file.

    Examples:
      megamem profile --ceilings
      megamem profile --ceilings --out hardware.yaml
      megamem profile --ceilings --nproc 8
    """

    out: str = ""
    """YAML file to write the section to."""
    nproc: int = 0
    """Most ranks to measure with; 0 for one on each GPU, or one on each core and twice as many."""
    disk: str = "."
    """Directory whose disk is measured."""


def main(argv: list[str]) -> int:
    """Entry of ``megamem profile --ceilings``."""
    arguments = parse(Arguments, argv, "profile --ceilings")
    if arguments.nproc < 0:
        raise ConfigError(f"--nproc is {arguments.nproc}; set 1 or more, or 0 for what this machine has")
    if not Path(arguments.disk).is_dir():
        raise ConfigError(f"--disk is {arguments.disk}, which is no directory; name one on the disk to measure")
    hardware = measure(arguments.nproc, Path(arguments.disk).resolve())
    text = yaml.safe_dump({"hardware": to_dict(hardware)}, sort_keys=False)
    _print(hardware)
    if arguments.out:
        write_text(Path(arguments.out), text)
        print(f"written to {arguments.out}")
    else:
        print(text, end="")
    return 0


def measure(most: int, disk: Path) -> HardwareConfig:
    """The ``hardware`` section of this machine, with ceilings for 1, 2, 4, ... ranks up to ``most``."""
    hardware = local_hardware(disk)
    cores = len(os.sched_getaffinity(0))
    devices = _devices() if hardware.on_gpu else 2 * cores
    if hardware.on_gpu and most > devices:
        raise ConfigError(f"--nproc is {most} and this machine has {devices} GPUs; set at most as many")
    most = most or devices
    counts = sorted({1, *(2**i for i in range(1, 12) if 2**i <= most), most})
    found = [_run(ranks, max(1, cores // ranks), disk) for ranks in counts]
    # Where a machine has no rank for every core, what several with one thread each get is not what one with all of them gets.
    ceilings = hardware.ceilings = build(
        CeilingsConfig,
        {
            "source": f"measured on {cores} cores" + (f" and {devices} GPUs" if hardware.on_gpu else ""),
            "date": datetime.now(UTC).date().isoformat(),
            "compute": [one["compute"] for one in found],
            "collectives": [entry for one in found for entry in one["collectives"]],
            "kernels_mib": found[0]["kernels_mib"],
            "disk_write_gb_per_s": max(one["disk_write_gb_per_s"] for one in found),
            "disk_read_gb_per_s": max(one["disk_read_gb_per_s"] for one in found),
        },
    )
    told = []
    for entry in ceilings.compute:
        with tempfile.TemporaryDirectory(dir=disk) as folder:
            told.append(train_reference(hardware, entry.ranks, Path(folder)))
    for entry, reference in zip(ceilings.compute, told, strict=True):
        entry.efficiency = _significant(reference.efficiency)
    ceilings.process_mib = _significant(max(reference.process_mib for reference in told))
    ceilings.fragmentation = _significant(statistics.fmean(reference.fragmentation for reference in told))
    return hardware


def _run(ranks: int, threads: int, disk: Path) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        failure = run_ranks(ranks, "megamem_launch.plan.probes", [str(file), str(disk)])
        if failure is not None:
            why = f": {failure.text}" if failure.text else ""  # else a rank has said it
            raise ConfigError(f"measuring with {ranks} ranks failed{why}; set --nproc to fewer")
        return _rounded(json.loads(file.read_text(encoding="utf-8")))


def _devices() -> int:
    import torch

    return torch.cuda.device_count()


def _rounded(data: Any) -> Any:
    """Measured numbers have no more digits than these."""
    if isinstance(data, float):
        return _significant(data)
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(item) for item in data] if isinstance(data, list) else data


def _significant(number: float) -> float:
    return float(f"{number:.{_SIGNIFICANT}g}")


def _print(hardware: HardwareConfig) -> None:
    ceilings = hardware.ceilings
    table = Table(
        title=f"ceilings of {hardware.device}: {ceilings.source}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("of each rank, while as many work")
    table.add_column("unit")
    for entry in ceilings.compute:
        table.add_column(f"{entry.ranks} x {entry.threads} threads", justify="right")
    rows: list[tuple[str, str, Callable[[RankCeilings], float]]] = [
        ("matmul fp32, 64 rows", "GFLOP/s", lambda e: 1e3 * e.matmul_tflops_fp32["64"]),
        ("matmul fp32, 1024 rows", "GFLOP/s", lambda e: 1e3 * e.matmul_tflops_fp32["1024"]),
        ("matmul bf16, 1024 rows", "GFLOP/s", lambda e: 1e3 * e.matmul_tflops_bf16["1024"]),
        ("attention", "GFLOP/s", lambda e: 1e3 * e.attention_tflops),
        ("element-wise, 8 MiB", "GB/s", lambda e: e.elementwise_gb_per_s["8"]),
        ("copy", "GB/s", lambda e: e.copy_gb_per_s),
        ("rows gathered", "GB/s", lambda e: e.gather_gb_per_s),
        ("rows updated", "GB/s", lambda e: e.row_update_gb_per_s),
        ("layer overhead", "ms", lambda e: e.layer_overhead_ms),
        ("expert overhead", "ms", lambda e: e.expert_overhead_ms),
        ("reached by a step", "", lambda e: e.efficiency),
    ]
    for name, unit, value in rows:
        table.add_row(name, unit, *(f"{value(entry):.3g}" for entry in ceilings.compute))
    console = Console(width=shutil.get_terminal_size((120, 24)).columns)
    console.print(table)
    links = Table(box=None, pad_edge=False)
    for name in ("collective", "ranks", "latency us", "GB/s"):
        links.add_column(name)
    for link in ceilings.collectives:
        links.add_row(link.operation, str(link.ranks), f"{link.latency_us:.0f}", f"{link.gb_per_s:.2f}")
    console.print(links)
    console.print(
        f"disk: {ceilings.disk_write_gb_per_s:.2f} GB/s written, {ceilings.disk_read_gb_per_s:.2f} GB/s read; "
        f"a process: {ceilings.process_mib:.0f} MiB, kernels of memories {ceilings.kernels_mib:.0f} MiB more; "
        f"fragmentation {ceilings.fragmentation:.0%}",
        highlight=False,
    )
