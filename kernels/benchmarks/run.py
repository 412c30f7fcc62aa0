"""Benchmarks of the memory operations against their peers in the same run: ``make bench``.

Every module beside this one that defines ``cases(options)`` takes part. Prints a table, and writes it as JSON and as a chart. A
ratio is a peer's time over ours: above 1, ours is faster. A bar must be met by the ratio of the minima and by that of the medians.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from harness import Case, Options, Timing, measure
from plot import plot_ratios
from rich.console import Console
from rich.table import Table

from megamem_kernels.parallel import threads

_LIBRARIES = ("torch", "numpy", "numba", "fbgemm-gpu-cpu")
_FOLDER = Path(__file__).parent


@dataclass(kw_only=True)
class Arguments(Options):
    """Measure the memory operations of megamem beside their peers."""

    only: list[str] = field(default_factory=list)
    """Benchmarks to run, by module name; all by default."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/bench")
    """Directory that gets bench.json and bench.svg."""


def main() -> None:
    """Run the benchmarks, print the table, write the files."""
    arguments = tyro.cli(Arguments)
    machine, console = describe_machine(), Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log has no width that a table must be cut to
    available = benchmark_names()
    if unknown := sorted(set(arguments.only) - set(available)):
        raise SystemExit(f"no benchmark {', '.join(unknown)}; there are {', '.join(available)}")
    console.print(", ".join(f"{key} {value}" for key, value in machine.items() if value), highlight=False)
    results: list[dict[str, Any]] = []
    for name in arguments.only or available:
        for case in load_cases(name, arguments):
            results.append(report(name, case, measure(case, arguments.rounds), judge=not arguments.quick))
            console.print(table_of(results[-1]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    body = {"machine": machine, "rounds": arguments.rounds, "quick": arguments.quick, "cases": results}
    (arguments.out / "bench.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    plot_ratios(results, arguments.out / "bench.svg")
    console.print(f"{arguments.out / 'bench.json'}, {arguments.out / 'bench.svg'}", highlight=False)


def benchmark_names() -> list[str]:
    """Modules of this folder that define ``cases``, found without importing them."""
    names = []
    for path in sorted(_FOLDER.glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "cases" for node in body):
            names.append(path.stem)
    return names


def load_cases(name: str, options: Options) -> Iterator[Case]:
    """The cases of one module, which go out of memory one by one."""
    cases: list[Case] = importlib.import_module(name).cases(options)
    while cases:
        yield cases.pop(0)


def report(benchmark: str, case: Case, timings: list[Timing], *, judge: bool = True) -> dict[str, Any]:
    """What was measured of a case, as JSON: every second, how each contender compares with ours, and with ``judge`` the bars."""
    ours = timings[0]
    contenders = []
    for timing in timings:
        entry: dict[str, Any] = {"name": timing.contender.name, "note": timing.contender.note}
        contenders.append(entry)
        if timing.missing:
            entry["missing"] = timing.missing
            continue
        entry |= {"seconds": timing.seconds, "min": timing.least, "median": timing.median}
        if case.unit_bytes is not None:
            entry["gb_per_second"] = case.unit_bytes / timing.least / 1e9
        if timing is not ours and not ours.missing:
            entry["ratio_min"] = timing.least / ours.least
            entry["ratio_median"] = timing.median / ours.median
            if judge and (bar := case.bars.get(timing.contender.name)) is not None:
                entry["bar"] = bar
                entry["met"] = bool(min(entry["ratio_min"], entry["ratio_median"]) >= bar)
    clock = "CPU seconds" if case.cpu_time else "wall seconds"
    return {"benchmark": benchmark, "case": case.name, "clock": clock, "contenders": contenders}


def table_of(result: dict[str, Any]) -> Table:
    """One case as a table, the first row ours."""
    unit = "CPU ms" if result["clock"] == "CPU seconds" else "ms"
    table = Table(title=f"\n{result['case']}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", min_width=34)
    for heading in (f"min {unit}", f"median {unit}", "GB/s", "ratio of min", "of median", "bar"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for entry in result["contenders"]:
        if "missing" in entry:
            table.add_row(entry["name"], *[""] * 6, entry["missing"])
            continue
        bar = f"{entry['bar']:g} {'met' if entry['met'] else 'MISSED'}" if "bar" in entry else ""
        times = (f"{entry[key] * 1e3:.3f}" for key in ("min", "median"))
        rates = (f"{entry[key]:.2f}" if key in entry else "" for key in ("gb_per_second", "ratio_min", "ratio_median"))
        table.add_row(entry["name"], *times, *rates, bar, entry["note"])
    return table


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, versions and commit; empty where unknown."""
    versions = {library: _version(library) for library in _LIBRARIES}
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads(),
        "torch threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
    }


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Commit of the sources, with a plus sign where they were changed since; empty outside a repository."""
    command = ["git", "-C", str(_FOLDER), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    main()
