"""What rank 0 does with the trainer's reports: journal, MLflow, progress line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megamem.config import to_dict
from megamem.observe.journal import Journal
from megamem.observe.lineage import describe
from megamem.observe.progress import Progress
from megamem.observe.tracking import Selection, Tracker
from megamem.parallel.layout import Layout
from megamem_launch import rundir
from megamem_launch.config import RunConfig
from megamem_launch.summary import environment


class RunObserver:
    """Writes to the journal first, then to whatever else listens; silent on every rank but the first.

    Args:
        config: The run.
        rank: Global rank; only 0 writes.
        steps_done: Optimizer steps that earlier incarnations of the run completed and this one builds on.
    """

    def __init__(self, config: RunConfig, *, rank: int, steps_done: int) -> None:
        self._active = rank == 0
        if not self._active:
            return
        run_dir = config.run_dir
        self._journal = Journal(run_dir / "journal.jsonl")
        self._progress = Progress(config.train.steps, enabled=True, log_interval=config.train.log_interval)
        self._progress.__enter__()
        self._tracker = Tracker(
            config.tracking, run_dir=run_dir, selection=Selection(config.train.log_interval, config.train.steps)
        )
        self._tracker.start(describe(to_dict(config), environment(config)), resume=steps_done > 0)
        first = steps_done + 1 if steps_done else 0
        self._journal.start(first, steps_done=steps_done, **_where(config))
        if steps_done:
            self._progress.event(f"resumed after step {steps_done}")

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record an optimizer step."""
        if not self._active:
            return
        self._journal.write("step", step, **metrics)
        self._progress.update(step, metrics)

    def evaluation(self, step: int, loss: float, *, blocked: bool) -> None:
        """Record a validation loss."""
        if not self._active:
            return
        self._journal.write("eval", step, loss=loss, blocked=blocked)
        suffix = " with memory blocked" if blocked else ""
        perplexity = math.exp(min(loss, 700.0))
        self._progress.event(f"validation loss{suffix} after {step} steps: {loss:.4f} (perplexity {perplexity:.1f})")

    def event(self, name: str, step: int, text: str) -> None:
        """Record something a person wants to know."""
        if not self._active:
            return
        self._journal.event(name, step, text=text)
        self._progress.event(text)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Write an entry of another kind to the journal."""
        if self._active:
            self._journal.write(kind, step, **values)

    def artifact(self, path: Path) -> None:
        """Keep a file with the tracked run."""
        if self._active:
            self._tracker.artifact(path)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"], step: int) -> None:
        """End of the process. Only the first call counts: what fails on the way out has been told."""
        if not self._active:
            return
        self._active = False
        self._progress.close()
        try:
            self._journal.event("fail" if status == "FAILED" else "stop", step)
            self._journal.close()
        except OSError:
            if status != "FAILED":
                raise  # a run that failed already has something to say, and this would hide it
        self._tracker.finish(status)


def _where(config: RunConfig) -> dict[str, Any]:
    """For the journal's start event: how the ranks share the work, and the incarnation under a supervisor."""
    layout = Layout.from_config(config.parallel, dist.get_world_size())
    degrees = {name: getattr(layout, name) for name in ("world_size", "dp", "tp", "pp", "cp", "ep", "vpp")}
    launched = {"incarnation": name} if (name := rundir.incarnation()) else {}
    return {"layout": {k: v for k, v in degrees.items() if k == "world_size" or v > 1}, **launched}
