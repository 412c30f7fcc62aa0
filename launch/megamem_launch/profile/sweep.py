"""Profiles of several layouts and batches, each in processes of its own, compared."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megamem.errors import ConfigError
from megamem.files import write_text
from megamem.observe.progress import format_bytes, format_count
from megamem_launch.config import RunConfig
from megamem_launch.profile.options import Options
from megamem_launch.profile.page import write_sweep_page
from megamem_launch.profile.table import Sheet, render
from megamem_launch.slurm.sweep import Sweep, point_names, read_sweep

Point = dict[str, Any]


def read_points(text: str) -> list[Point]:
    """Points of a sweep file (``grid`` and ``points``, as `megamem launch slurm --sweep` takes it) or of
    ``SETTING=V1,V2;SETTING=...``, whose values are read as YAML. ConfigError for anything else."""
    if "=" not in text:
        return read_sweep(Path(text)).all_points()
    grid: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        setting, equals, values = part.partition("=")
        if not equals or not values or not setting:
            raise ConfigError(f"--sweep has {part!r}; write SETTING=VALUE,VALUE;SETTING=... or name a YAML file")
        try:
            grid[setting] = [yaml.safe_load(value) for value in values.split(",")]
        except yaml.YAMLError:
            raise ConfigError(f"--sweep has {part!r}, whose values are not YAML; put them into a file") from None
    return Sweep(grid=grid).all_points()


def run_sweep(config: RunConfig, options: Options, text: str, source: str, overrides: Sequence[str]) -> int:
    """Profile every point of ``text`` below ``options.out``, one after the other; 0 where at least one could be profiled.

    Writes ``sweep.json`` and ``sweep.html``. A point that is refused, or that fails, is a row with its reason.
    """
    points = read_points(text)
    console, results = Console(), []
    for name, point in zip(point_names(points), points, strict=True):
        console.print(f"profiling {name}", markup=False, highlight=False)
        settings = [f"{setting}={json.dumps(value)}" for setting, value in point.items()]
        parent = f"tracking.parent={json.dumps(config.tracking.parent or config.name)}"
        out = options.out / "sweep" / name
        results.append(_profile(name, point, [source, *overrides, *settings, parent], options, out))
    results.sort(key=lambda result: -result.get("tokens_per_second", 0.0))
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "sweep.json", json.dumps({"name": config.name, "points": results}, indent=1) + "\n")
    sheet = sweep_sheet(results)
    links = [f"sweep/{result['name']}/profile.html" for result in results if "refused" not in result]
    page = write_sweep_page(config.name, sheet, plot(results), links, options.out)
    console.print(render(replace(sheet, columns=sheet.columns[:-1], rows=[row[:-1] for row in sheet.rows])))
    for result in results:
        if "refused" in result:  # too long for a column
            console.print(f"{result['name']}: {result['refused']}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nsweep: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0 if links else 2


def sweep_sheet(results: Sequence[Mapping[str, Any]]) -> Sheet:
    """One row per point, the fastest first."""
    rows = []
    for result in results:
        if "refused" in result:
            rows.append([result["name"], "refused", "", "", "", "", result["refused"]])
            continue
        mfu = f"{result['mfu']:.1%}" if "mfu" in result else ""
        rows.append(
            [
                result["name"],
                format_count(result["tokens_per_second"]),
                f"{result['step_seconds'] * 1e3:.4g}",
                f"{format_count(result['flops_per_second'])} {mfu}".strip(),
                format_bytes(result["peak_memory_bytes"]),
                f"{result['pipeline_wait']:.1%}",
                "",
            ]
        )
    columns = ["point", "tok/s", "step ms", "FLOP/s per rank, MFU", "peak memory", "pipeline wait", "refused because"]
    return Sheet("sweep", columns, rows, "Peak memory is the most of any rank.")


def plot(results: Sequence[Mapping[str, Any]]) -> str:
    """Throughput and peak memory of the points as an SVG; empty where none could be profiled."""
    measured = [result for result in reversed(results) if "refused" not in result]
    if not measured:
        return ""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 0.4 * len(measured)), layout="constrained")
    FigureCanvasSVG(figure)
    speed, memory = figure.subplots(1, 2, sharey=True)
    names = [result["name"] for result in measured]
    speed.barh(names, [result["tokens_per_second"] for result in measured], color="#2b6cb0")
    speed.set_xlabel("tokens per second")
    memory.barh(names, [result["peak_memory_bytes"] / 2**20 for result in measured], color="#c2610c")
    memory.set_xlabel("peak memory of a rank, MiB")
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _profile(name: str, point: Point, settings: Sequence[str], options: Options, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "megamem.cli", "profile", *settings, "--out", str(out)]
    command += ["--warmup", str(options.warmup), "--steps", str(options.steps), "--traced", str(options.traced)]
    if options.cluster:
        command += ["--cluster", options.cluster]
    if options.peak_tflops:
        command += ["--peak-tflops", str(options.peak_tflops)]
    if options.checkpoint:
        command.append("--checkpoint")
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    result: dict[str, Any] = {"name": name, "settings": point}
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.startswith("megamem profile: ")]
        last = (said or ended.stderr.splitlines() or [f"it ended with exit code {ended.returncode}"])[-1]
        return result | {"refused": last.removeprefix("megamem profile: ")}
    profile = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    result |= {
        "tokens_per_second": profile["tokens_per_second"],
        "step_seconds": profile["step_seconds"]["mean"],
        "flops_per_second": profile["flops"]["per_rank_per_second"],
        "peak_memory_bytes": max(profile["memory"]["held_bytes"]),
        "pipeline_wait": max(rank["share_of_step"] for rank in profile["bubble"]),
    }
    return result | ({"mfu": profile["flops"]["mfu"]} if "mfu" in profile["flops"] else {})
