"""Arguments of ``megamem launch status | logs | cancel | requeue | history``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

RunArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclass
class StatusArguments:
    """Say what a run that was started by `megamem launch` does now: whether it waits and why, how far it is, on which nodes.

    SLURM is asked each time. Where it does not answer the state is `unknown` and the exit code 1; a run that was started by
    `megamem launch local` needs no SLURM. The directory of a sweep lists its points.

    Examples:
      megamem launch status quickstart
      megamem launch status runs/quickstart --json
    """

    run: RunArgument
    """Directory of a run or a sweep, or its name below --runs-dir."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    json: bool = False
    """Print JSON."""


@dataclass
class LogsArguments:
    """Print the last lines of what the supervisor and the ranks of a run wrote, each with where it comes from.

    Examples:
      megamem launch logs quickstart --follow
      megamem launch logs quickstart --rank 3 --lines 200
      megamem launch logs quickstart --job          what the batch script wrote: the supervisor and rank 0
      megamem launch logs quickstart --incarnation 1234.1.0
    """

    run: RunArgument
    """Directory of a run, or its name below --runs-dir."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    rank: int | None = None
    """Only this rank."""
    incarnation: str = ""
    """Incarnation, as `megamem launch history` lists them; default: the last."""
    job: bool = False
    """Instead of those logs what the batch scripts wrote, in which all incarnations of a job follow each other."""
    lines: int = 20
    """Lines of each log."""
    follow: bool = False
    """Go on printing what is written, of later incarnations too, until the run has finished or was cancelled."""


@dataclass
class CancelArguments:
    """End all jobs of a run for good, those of its chain that wait included, and wait until they are gone.

    Nothing is saved: touch RUN/STOP to let a run save and end. The directory of a sweep cancels all its points.

    Examples:
      megamem launch cancel quickstart
    """

    run: RunArgument
    """Directory of a run or a sweep, or its name below --runs-dir."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    timeout: float = 120.0
    """Seconds to wait until the jobs are gone."""
    json: bool = False
    """Print JSON."""


@dataclass
class RequeueArguments:
    """Let a run save, go back into the queue and go on from there; start one again whose jobs have ended; release a held one.

    A run that has finished or was cancelled is refused.

    Examples:
      megamem launch requeue quickstart
      megamem launch requeue quickstart --now       loses what was done since the last checkpoint
    """

    run: RunArgument
    """Directory of a run, or its name below --runs-dir."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    now: bool = False
    """Stop the ranks at once, without saving."""
    json: bool = False
    """Print JSON."""


@dataclass
class HistoryArguments:
    """List the incarnations of a run: when and where each began, how far it came, and why it ended.

    Where the cluster keeps accounts, with elapsed time and memory by SLURM's measure.

    Examples:
      megamem launch history quickstart
      megamem launch history quickstart --json
    """

    run: RunArgument
    """Directory of a run, or its name below --runs-dir."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    json: bool = False
    """Print JSON."""
