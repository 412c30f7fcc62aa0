"""What the supervisor reads of a submission."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megamem.errors import LaunchError
from megamem_launch.cluster import Cluster, load_cluster
from megamem_launch.config import load_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A run, and what it is supervised by."""

    run_dir: Path
    config: Path
    """The resolved configuration."""
    steps: int
    """``train.steps``."""
    stages: int
    """Pipeline stages."""
    kind: str = "run"
    """``run``, ``chain``, ``sweep`` or ``local``."""
    cluster: Cluster


def read_submission(folder: Path) -> Submission:
    """The submission in ``folder``; LaunchError where it is damaged, ConfigError where a setting in it is."""
    try:
        record = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
        run_dir = Path(record["run_dir"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"{folder} is not a submission ({type(error).__name__}: {error}); submit with `megamem launch`"
        ) from None
    config = load_config(folder / "config.yaml")
    return Submission(
        run_dir=run_dir,
        config=folder / "config.yaml",
        steps=config.train.steps,
        kind=str(record.get("kind", "run")),
        stages=config.parallel.pipeline_model_parallel_size,
        cluster=load_cluster(folder / "cluster.yaml"),
    )
