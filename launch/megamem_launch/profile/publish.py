"""What becomes of a profile: the terminal, the page, MLflow."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from megamem.config import to_dict
from megamem.errors import MegamemError
from megamem.observe.tracking import log_numbers
from megamem_launch.config import RunConfig, save_config
from megamem_launch.profile.page import write_page
from megamem_launch.profile.table import headlines, render, sheets


def publish(profile: Mapping[str, Any], config: RunConfig, out: Path) -> None:
    """Print a profile, write its page into ``out`` and send its numbers to MLflow."""
    console = Console()
    for label, value, note in headlines(profile):
        console.print(f"{label:15} {value}   [dim]{note}[/dim]", highlight=False)
    for sheet in sheets(profile):
        console.print()
        console.print(render(sheet))
    page = write_page(profile, out)
    console.print(f"\nprofile: {page}", markup=False, highlight=False, soft_wrap=True)
    save_config(config, out / "config.yaml")
    if config.tracking.mlflow:
        try:
            _track(profile, config, out)
        except MegamemError as error:
            print(f"megamem profile: {error}; the profile itself is complete", file=sys.stderr)


def _track(profile: Mapping[str, Any], config: RunConfig, out: Path) -> None:
    """Log the numbers as an MLflow run of their own below that of the configuration's name, beside those of training."""
    settings = to_dict(config) | {"profile": profile["windows"]}
    settings["tracking"]["parent"] = config.tracking.parent or config.name
    log_numbers(
        out,
        settings,
        metrics_of(profile),
        step=profile["windows"]["measured"],
        source="megamem profile",
        runs_dir=Path(config.runs_dir),
    )


def metrics_of(profile: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a profile by name."""
    flops = profile["flops"]
    numbers = {
        "tokens_per_second": profile["tokens_per_second"],
        "step_seconds": profile["step_seconds"]["mean"],
        "model_flops_per_second_per_rank": flops["per_rank_per_second"],
        "peak_memory_bytes": max(profile["memory"]["held_bytes"]),
        "pipeline_wait_share": max(rank["share_of_step"] for rank in profile["bubble"]),
    }
    if "mfu" in flops:
        numbers["mfu"] = flops["mfu"]
    ranks = profile["breakdown"]["ranks"]
    for name in sorted({name for rank in ranks for name in rank}):
        numbers[f"seconds/{name}"] = sum(rank.get(name, 0.0) for rank in ranks) / len(ranks)
    numbers |= {f"wire/{wire}": traffic["mean_bytes"] for wire, traffic in profile["wires"].items()}
    numbers |= {f"memory/{kind}": size for kind, size in profile["memory"]["largest"].items()}
    return {f"profile/{name}": float(value) for name, value in numbers.items()}
