"""A step that is not finite on one rank is skipped on all of them, and leaves every byte as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamem.testing.distributed import run_distributed
from megamem_launch.config import load_config

OVERRIDES = [
    "base=tiny",
    "train.steps=5",
    "train.precision=fp32",
    "train.eval_batches=0",
    "tracking.mlflow=false",
    "model.moe.router=sigmoid_bias",
]


def poisoned_run(
    overrides: list[str], data_path: str, victim: str
) -> tuple[list[float], list[str], list[bool], set[int]]:
    """Train 5 steps; in the third, the last rank's gradient of ``victim`` becomes NaN. The last value holds the steps that
    the optimizers of rows and dense parameters have counted."""
    from megamem.parallel import groups as parallel_groups
    from megamem_launch.compose import build_parts, open_data
    from megamem_launch.run import make_trainer
    from megamem_launch.validate import validate

    config = load_config(None, [*OVERRIDES, *overrides, f"data.path={data_path}"])
    layout = validate(config, dist.get_world_size())
    groups = parallel_groups.initialize(layout, seed=1)
    parts = build_parts(config, open_data(config), groups)
    events: list[str] = []
    losses: list[float] = []
    unchanged: list[bool] = []

    class Recorder:
        def step(self, step: int, metrics: dict[str, float]) -> None:
            losses.append(metrics["loss"])
            unchanged.append(all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)))
            before[:] = [t.clone() for t in state()]

        def evaluation(self, step: int, loss: float, *, blocked: bool) -> None: ...

        def event(self, name: str, step: int, text: str) -> None:
            events.append(f"{name} {step} {text}")

    def state() -> list[torch.Tensor]:
        tensors = [e.tensor.detach() for e in parts.entries]
        for table in parts.memory.tables.values():
            tensors += [*table.rows.arrays.values(), *table.state.arrays.values()]
        return tensors

    before = [t.clone() for t in state()]
    trainer = make_trainer(parts, Recorder(), save=lambda step: None)
    run = trainer.runner.run
    calls = [0]

    def poison(batch, memory, *, train):
        measured = run(batch, memory, train=train)
        calls[0] += 1
        if calls[0] == 3 and dist.get_rank() == dist.get_world_size() - 1:
            if victim == "table":
                next(iter(memory.working_sets.values())).grad[0, 0] = float("nan")
            else:
                next(p for p in parts.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return measured

    trainer.runner.run = poison
    trainer.run()
    parts.loader.close()
    parallel_groups.destroy()
    # An owner of few rows of one table may have none of them in the last step, but not of all tables.
    counted = {max(int(table.state.arrays["last_step"].max()) for table in parts.memory.tables.values())}
    return losses, events, unchanged, counted | {parts.zero.state_dict()["step"]}


@pytest.mark.parametrize("victim", ["table", "dense"])
@pytest.mark.parametrize("layout", [[], ["parallel.pipeline_model_parallel_size=2"]], ids=["dp2", "pp2"])
def test_step_is_skipped_everywhere(victim: str, layout: list[str], prepared_tiny: Path) -> None:
    results = run_distributed(poisoned_run, 2, layout, str(prepared_tiny), victim)
    for losses, events, unchanged, counted in results:
        assert counted == {4}
        assert unchanged == [False, False, True, False, False]
        assert len(losses) == 5 and all(loss == loss for loss in losses)
        norm = {"table": "inf", "dense": "nan"}[victim]  # the sum over rows tells finite from not, and no more
        assert len(events) == 1
        assert events[0].startswith(f"skip 3 step 3 skipped on all ranks: the gradient norm is {norm}")
