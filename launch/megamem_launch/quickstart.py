"""The whole path on one machine: real text, training, a kill, a resume, a Hugging Face export, a sentence.

``python -m megamem_launch.quickstart`` is what ``make quickstart`` runs. Every number it prints was measured in the run.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from megamem.errors import MegamemError
from megamem.observe.journal import read_journal
from megamem.observe.tracking import tracking_uri
from megamem_launch.config import RunConfig, load_config

console = Console()


@dataclass
class Arguments:
    """Train the quickstart model from nothing and show what came of it."""

    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Settings to change, as section.setting=value."""
    config: str = "configs/quickstart.yaml"
    """Configuration to train."""
    prompt: str = "def read_file(path):\n    "
    """What the exported model continues."""
    new_tokens: int = 48
    """Tokens that it writes."""
    fresh: bool = False
    """Delete the previous quickstart run of the same name and begin again."""


def main(argv: list[str] | None = None) -> int:
    """Run all stages; exit code 2 with one sentence where the user has to change something."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m megamem_launch.quickstart")
    try:
        quickstart(arguments)
    except MegamemError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    return 0


def quickstart(arguments: Arguments) -> None:
    """The stages in order, and the closing screen."""
    began = time.monotonic()
    config = load_config(arguments.config, arguments.overrides)
    run_dir, export = config.run_dir, config.run_dir / "huggingface"
    if arguments.fresh and run_dir.exists():
        shutil.rmtree(run_dir)
    settings = [arguments.config, *arguments.overrides]
    _title("1/5  prepare text, tokenizer, shards and document clusters")
    _megamem("data", "prepare", *settings)
    repeated = _train(config, settings)
    _title("4/5  export to Hugging Face format")
    _megamem("export", str(run_dir), str(export), "--overwrite")
    _title("5/5  generate from the export")
    sampling = ["--max-new-tokens", str(arguments.new_tokens), "--temperature", "0.7"]
    text = _megamem("generate", str(export), arguments.prompt, *sampling, capture=True)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    _screen(config, summary, export, text, repeated, time.monotonic() - began)


def _train(config: RunConfig, settings: list[str]) -> str:
    """Train, killing the process once after its first checkpoint; says how the kill and the resume went."""
    done, interval = _steps_done(config.run_dir), config.checkpoint.interval
    if done >= config.train.steps and (config.run_dir / "summary.json").exists():
        _title(f"2/5 and 3/5  skipped: {config.run_dir} is trained already (--fresh begins again)")
        return ""
    if interval and done + interval + 1 < config.train.steps:
        _title("2/5  train, and kill the process")
        _kill_after(config, settings, done)
    _title("3/5  go on from the last checkpoint")
    _megamem("train", *settings)
    return _repeated_steps(config.run_dir)


def _kill_after(config: RunConfig, settings: list[str], done: int) -> None:
    """Start training and SIGKILL it at a random step between the next checkpoint and the one after."""
    interval = config.checkpoint.interval
    first = done + interval
    target = random.randint(first + 1, min(first + interval, config.train.steps - 1))
    process = subprocess.Popen(_command("train", *settings))
    try:
        while process.poll() is None and _steps_done(config.run_dir) < target:
            time.sleep(0.2)
        if process.poll() is not None:
            raise MegamemError(
                f"training ended by itself with exit code {process.returncode} before it could be killed"
            )
    finally:
        kill_family(process)
    console.print(f"\n[bold red]killed[/] (SIGKILL) during step {_steps_done(config.run_dir) + 1}")


def kill_family(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and all its descendants; ranks that torchrun started have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for member in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def _repeated_steps(run_dir: Path) -> str:
    """What the journal says about steps that a kill made the run do twice; empty where there are none."""
    losses: dict[int, list[float]] = {}
    for entry in read_journal(run_dir / "journal.jsonl", overtaken=True):
        if entry["kind"] == "step":
            losses.setdefault(entry["step"], []).append(entry["loss"])
    twice = {step: values for step, values in losses.items() if len(values) > 1}
    if not twice:
        return ""
    same = sum(len(set(values)) == 1 for values in twice.values())
    return f"killed after step {max(twice)}, resumed after step {min(twice) - 1}; {same} of {len(twice)} repeated losses identical"


def _steps_done(run_dir: Path) -> int:
    journal = run_dir / "journal.jsonl"
    if not journal.exists():
        return 0
    return max((entry["step"] for entry in read_journal(journal) if entry["kind"] == "step"), default=0)


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "megamem.cli", *words]


def _megamem(*words: str, capture: bool = False) -> str:
    result = subprocess.run(_command(*words), check=False, stdout=subprocess.PIPE if capture else None, text=True)
    if result.returncode:
        raise MegamemError(f"`megamem {' '.join(words[:2])} ...` ended with exit code {result.returncode}; see above")
    return result.stdout or ""


def _title(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


def _screen(config: RunConfig, summary: dict[str, Any], export: Path, text: str, repeated: str, seconds: float) -> None:
    losses, parameters = summary["validation_loss"], summary["parameters"]
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_column()

    def row(name: str, value: str) -> None:
        table.add_row(name, value)

    row("validation loss, before training", f"{losses['first']:.4f}")
    row("validation loss, after", f"[bold green]{losses['last']:.4f}[/]")
    if "last_blocked" in losses:
        row("the same with memory blocked", f"{losses['last_blocked']:.4f}")
    row("parameters", ", ".join(f"{kind} {parameters[kind] / 1e6:.2f} M" for kind in ("dense", "experts", "tables")))
    row("training", f"{summary['steps']} steps, {summary['tokens_seen'] / 1e6:.2f} M tokens")
    if repeated:
        row("SIGKILL", repeated)
    row("throughput (median)", f"{summary['tokens_per_second']:,.0f} tokens/s on {summary['device']}")
    if "unique_row_ratio" in summary:
        row("unique rows per lookup", f"{summary['unique_row_ratio']:.3f}")
    row("Hugging Face export", str(export))
    row("report", str(config.run_dir / "report.html"))
    row("this command took", f"{seconds / 60:.1f} min")
    console.print(Panel(table, title="megamem quickstart", expand=False))
    if config.tracking.mlflow:
        uri = tracking_uri(config.tracking, Path(config.runs_dir))
        print(f"MLflow: {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}")
    console.print(Panel(text.strip("\n"), title="written by the exported model", expand=False), markup=False)


if __name__ == "__main__":
    sys.exit(main())
