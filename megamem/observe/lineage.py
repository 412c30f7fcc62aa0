"""What a tracked run is made of and what came of it: settings, code, prepared data, and the model at its end.

All of it is read from the files of the run, so that a run whose tracker was away can be told of later.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megamem
from megamem.observe.tracking_points import flatten, numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedData:
    """Prepared data as a tracker names it."""

    name: str
    digest: str
    """Fingerprint of what the data was prepared from and how."""
    path: Path
    profile: dict[str, Any]
    """Counts, such as ``tokens``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedModel:
    """A checkpoint that a run ended with. It stays where it is; trackers get its place."""

    path: Path
    step: int
    params: dict[str, Any]
    metrics: dict[str, float]
    """Validation losses, under the names that the tracker shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What is known of a run when it starts."""

    params: dict[str, Any]
    """Flat settings."""
    tags: dict[str, str] = field(default_factory=dict)
    data: TrackedData | None = None


def describe(
    config: Mapping[str, Any], environment: Mapping[str, Any] | None = None, *, source: str = "megamem train"
) -> Description:
    """The run of a resolved configuration (nested plain values); ``environment`` joins its parameters. ``source``: what made it."""
    params = flatten(config) | (flatten({"environment": environment}) if environment else {})
    tags = {"mlflow.source.name": source, "mlflow.source.type": "LOCAL"}
    if job := os.environ.get("SLURM_JOB_ID"):
        tags |= {"mlflow.source.type": "JOB", "slurm.job_id": job}
    if incarnation := os.environ.get("MEGAMEM_INCARNATION"):
        tags["megamem.incarnation"] = incarnation
    path = config.get("data", {}).get("path")
    return Description(params=params, tags=tags, data=tracked_data(Path(path)) if path else None)


def tracked_data(path: Path) -> TrackedData | None:
    """Prepared data in a directory; None where there is none."""
    try:
        manifest = json.loads((path / "data.json").read_text(encoding="utf-8"))
        kept = ("documents", "tokens", "vocab_size", "validation_fraction", "fingerprint")
        profile = {key: manifest[key] for key in kept if key in manifest}
        return TrackedData(
            name=path.resolve().name, digest=str(manifest["fingerprint"]), path=path.resolve(), profile=profile
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tracked_model(run_dir: Path) -> TrackedModel | None:
    """The last checkpoint of a run with what its summary says; None for a run that has not ended or saved nothing."""
    checkpoints = run_dir / "checkpoints"
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        path = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
        step, losses = int(summary["steps"]), summary.get("validation_loss", {})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    shown = ("parameters", "tokens_seen", "precision", "versions")
    params = flatten({"step": step, "checkpoint": str(path.resolve())} | {k: summary[k] for k in shown if k in summary})
    metrics = numbers({"eval/loss": losses.get("last"), "eval_blocked/loss": losses.get("last_blocked")})
    return TrackedModel(path=path.resolve(), step=step, params=params, metrics=metrics)


def code_tags() -> dict[str, str]:
    """Tags of the commit that this code is at; empty where it does not lie in a git checkout of its own."""
    source = Path(megamem.__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(source.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # an installed copy may lie below another checkout
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "mlflow.source.git.dirty": str(dirty).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
