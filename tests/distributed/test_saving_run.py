"""Whole runs that save: in the background or not changes nothing but the time, and a save that fails does not end a run."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamem.testing.distributed import run_distributed
from megamem_checkpoints.diff import compare_checkpoints
from megamem_checkpoints.reader import CheckpointReader
from megamem_launch.config import load_config

STEPS, INTERVAL = 7, 2
SETTINGS = [
    "base=tiny",
    f"train.steps={STEPS}",
    "train.precision=fp32",
    "train.global_batch_size=4",
    "train.eval_batches=0",
    f"checkpoint.interval={INTERVAL}",
    "checkpoint.keep=9",
    "checkpoint.incremental=on",
    "tracking.mlflow=false",
]


@dataclass
class Recorder:
    """What an observer is told."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    events: list[tuple[str, int, str]] = field(default_factory=list)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["loss"])
        self.seconds.append(metrics.get("seconds/checkpoint", 0.0))

    def evaluation(self, step: int, loss: float, *, blocked: bool) -> None: ...

    def event(self, name: str, step: int, text: str) -> None:
        self.events.append((name, step, text))

    def record(self, kind: str, step: int, **values: Any) -> None: ...


def train(overrides: list[str], failing: list[int]) -> tuple[Recorder, str]:
    """Train with a disk that is slow, and full at the saves of ``failing``; what was told, and the error that ended it."""
    from megamem.errors import CheckpointError
    from megamem.parallel import groups as parallel_groups
    from megamem_checkpoints import rng
    from megamem_launch.compose import build_parts, open_data
    from megamem_launch.run import make_trainer
    from megamem_launch.saver import Saver
    from megamem_launch.validate import validate

    write, full = rng.write, [f"step_{step:08d}.tmp" for step in failing]

    def slow(path: Path, *arguments: Any) -> Any:
        time.sleep(0.3)  # the first that is written: tables are read after they were trained on
        if path.parent.parent.name in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *arguments)

    rng.write = slow
    config = load_config(None, [*SETTINGS, *overrides])
    layout = validate(config, dist.get_world_size())
    groups = parallel_groups.initialize(layout, seed=config.train.seed)
    recorder, error = Recorder(), ""
    parts = build_parts(config, open_data(config), groups)
    trainer = make_trainer(parts, recorder, lambda step: saver.save(step), after_step=lambda: saver.report())
    saver = Saver(parts, recorder, trainer)  # type: ignore[arg-type]
    try:
        trainer.run()
        saver.wait()
    except CheckpointError as failure:
        saver.close()
        error = str(failure)
    parts.close()
    parallel_groups.destroy()
    return recorder, error


def run(ranks: int, data: Path, runs: Path, *overrides: str, failing: tuple[int, ...] = ()) -> tuple[Recorder, str]:
    """What the first rank of a run was told."""
    results = run_distributed(train, ranks, [f"data.path={data}", f"runs_dir={runs}", *overrides], list(failing))
    assert all(other.losses == results[0][0].losses for other, _ in results)
    return results[0]


def checkpoint_of(runs: Path, step: int) -> CheckpointReader:
    return CheckpointReader(next(runs.glob(f"*/checkpoints/step_{step:08d}")))


def test_saving_in_the_background_changes_nothing(prepared_tiny: Path, tmp_path: Path) -> None:
    plain, _ = run(2, prepared_tiny, tmp_path / "plain", "checkpoint.asynchronous=false")
    background, _ = run(2, prepared_tiny, tmp_path / "background")
    assert plain.losses == background.losses and len(plain.losses) == STEPS
    for recorder in (plain, background):
        assert [(name, step) for name, step, _ in recorder.events] == [("checkpoint", step) for step in (2, 4, 6, 7)]
        # Each is counted in the step after it.
        assert [step + 1 for step, seconds in enumerate(recorder.seconds) if seconds > 0] == [3, 5, 7]
    for step in (2, 4, 6, 7):
        one, other = (checkpoint_of(tmp_path / name, step) for name in ("plain", "background"))
        other.verify()
        found = compare_checkpoints(one, other)
        assert found.equal, found
        assert any(table.increments for table in other.manifest.tables.values()) == (step > 2)


def test_a_save_that_fails_costs_its_checkpoint_and_two_in_a_row_the_run(prepared_tiny: Path, tmp_path: Path) -> None:
    failed, error = run(1, prepared_tiny, tmp_path / "failed", failing=(4,))
    assert len(failed.losses) == STEPS and not error
    names = ["checkpoint", "checkpoint_failed", "checkpoint", "checkpoint"]
    assert [(name, step) for name, step, _ in failed.events] == list(zip(names, (2, 4, 6, 7), strict=True))
    assert "No space left on device" in failed.events[1][2]
    for step, chain in ((2, 0), (6, 0), (7, 1)):
        reader = checkpoint_of(tmp_path / "failed", step)
        reader.verify()
        assert reader.manifest.chain == chain
    ended, error = run(1, prepared_tiny, tmp_path / "ended", failing=(2, 4))
    assert ended.losses == failed.losses[:4] and "step 4 was not written" in error
    assert [(name, step) for name, step, _ in ended.events] == [("checkpoint_failed", 2), ("checkpoint_failed", 4)]
