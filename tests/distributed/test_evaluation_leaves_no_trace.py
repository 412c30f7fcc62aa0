"""Evaluations between the steps of a run change neither its losses nor any byte of its state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamem.testing.distributed import run_distributed
from megamem_launch.config import load_config

OVERRIDES = ["base=tiny", "train.steps=4", "train.precision=fp32", "tracking.mlflow=false"]


def train(overrides: list[str], data_path: str) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor], int]:
    """What every step measured, the state after the last one, and the number of evaluations."""
    from megamem.parallel import groups as parallel_groups
    from megamem_launch.compose import build_parts, open_data
    from megamem_launch.run import make_trainer
    from megamem_launch.validate import validate

    config = load_config(None, [*OVERRIDES, *overrides, f"data.path={data_path}"])
    groups = parallel_groups.initialize(validate(config, dist.get_world_size()), seed=config.train.seed)
    parts = build_parts(config, open_data(config), groups)
    steps: list[tuple[float, ...]] = []
    evaluations: list[float] = []

    class Recorder:
        def step(self, step: int, metrics: dict[str, float]) -> None:
            steps.append(tuple(metrics[name] for name in ("loss", "grad_norm", "aux_loss", "lookups", "unique_rows")))

        def evaluation(self, step: int, loss: float, *, blocked: bool) -> None:
            evaluations.append(loss)

        def event(self, name: str, step: int, text: str) -> None: ...

    make_trainer(parts, Recorder(), save=lambda step: None).run()
    state = {"rng": torch.get_rng_state()}
    for entry in parts.entries:
        state[entry.name] = entry.local.clone()
    for table in parts.memory.tables.values():
        state |= {f"{table.spec.name}/{name}": t for name, t in table.read(table.start, table.stop).items()}
    parts.loader.close()
    if parts.validation is not None:
        parts.validation.close()
    parallel_groups.destroy()
    return steps, state, len(evaluations)


@pytest.mark.parametrize("router", ["sigmoid_bias", "softmax_aux_loss"])
@pytest.mark.parametrize("layout", [[], ["parallel.pipeline_model_parallel_size=2"]], ids=["dp2", "pp2"])
def test_evaluation_leaves_no_trace(router: str, layout: list[str], prepared_tiny: Path) -> None:
    overrides = [*layout, f"model.moe.router={router}"]
    often = [*overrides, "train.eval_interval=1", "train.eval_batches=2"]
    never = [*overrides, "train.eval_batches=0"]
    with_evaluations = run_distributed(train, 2, often, str(prepared_tiny))
    without = run_distributed(train, 2, never, str(prepared_tiny))
    for (steps, state, evaluations), (expected_steps, expected, _) in zip(with_evaluations, without, strict=True):
        assert evaluations == 6  # before the first step, after each of four, and once with memory blocked
        assert steps == expected_steps
        assert state.keys() == expected.keys()
        assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []
