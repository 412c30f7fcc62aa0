"""A checkpoint moves between layouts with its optimizer states: the next steps go on as if nothing had been resharded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamem.testing.distributed import run_distributed
from megamem_launch.config import load_config

SAVED, STEPS = 3, 8
COMMON = [
    "base=tiny",
    f"train.steps={STEPS}",
    "train.precision=fp32",
    "train.global_batch_size=8",
    "train.eval_batches=0",
    "checkpoint.interval=0",
    "tracking.mlflow=false",
    "data.seq_length=32",
    "model.make_vocab_size_divisible_by=64",
    "model.moe.shared_expert_hidden_size=64",
    "model.moe.router=sigmoid_bias",
    "memory.engram.layers=[0, 3]",
    "memory.placement=scrambled",
    # As in the layout parity tests: without these, rounding noise is blown up to whole steps.
    "memory.optimizer.epsilon=1e-5",
    "memory.engram.sqrt_gate=false",
    "optimizer.epsilon=1e-5",
]


def degrees(**values: int) -> list[str]:
    """Settings of the ``parallel`` section from short names; tensor parallelism comes with sequence parallelism."""
    long = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "first": "num_layers_in_first_pipeline_stage",
        "last": "num_layers_in_last_pipeline_stage",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "cp": "context_parallel_size",
    }
    sequence = ["parallel.sequence_parallel=true"] if values.get("tp", 1) > 1 else []
    return [f"parallel.{long[name]}={value}" for name, value in values.items()] + sequence


DISK = ["memory.storage.tier=disk", "memory.disk.cache_gib=1e-5"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "1-disk": (1, DISK),
    "1-prefetch3": (1, ["memory.prefetch_depth=3"]),
    "dp2-state-on-disk": (2, ["memory.storage.state_tier=disk"]),
    "dp2-zero0": (2, ["optimizer.zero_stage=0"]),
    "dp2-zero2": (2, ["optimizer.zero_stage=2"]),
    "dp2-offload": (2, ["optimizer.offload=host"]),
    "tp2": (2, degrees(tp=2)),
    "pp2-vpp2": (2, degrees(pp=2, vpp=2)),
    "ep2": (2, degrees(ep=2)),
    "cp2": (2, degrees(cp=2)),
    "tp2-ep2-etp1": (2, degrees(tp=2, ep=2, etp=1)),
    "pp3-uneven": (3, degrees(pp=3, first=1, last=1)),
    "dp4": (4, []),
    "tp2-pp2": (4, degrees(tp=2, pp=2)),
    "tp2-cp2": (4, degrees(tp=2, cp=2)),
    "tp2-ep2-disk": (4, degrees(tp=2, ep=2) + DISK),
    "pp2-ep2": (4, degrees(pp=2, ep=2)),
    "dp8": (8, []),
    "tp2-pp2-vpp2-ep2": (8, degrees(tp=2, pp=2, vpp=2, ep=2)),
}
"""Name to ranks and what differs from one process with ZeRO-1 and tables in host memory."""

PAIRS = [
    ("1", "tp2-pp2"),
    ("1", "dp2-zero2"),
    ("1", "cp2"),
    ("1", "dp2-state-on-disk"),
    ("dp2-zero2", "tp2"),
    ("dp2-zero2", "dp2-zero0"),
    ("dp2-zero2", "tp2-ep2-etp1"),
    ("tp2-pp2", "1-disk"),
    ("tp2-pp2", "dp4"),
    ("tp2-pp2", "pp3-uneven"),
    ("tp2-pp2", "tp2-pp2-vpp2-ep2"),
    ("tp2-ep2-disk", "1-prefetch3"),
    ("tp2-ep2-disk", "pp2-vpp2"),
    ("tp2-ep2-disk", "tp2-cp2"),
]
"""What is checked every time; the slow tier checks every pair of layouts."""

Tables = dict[str, tuple[np.ndarray, dict[str, torch.Tensor]]]


class Recorder:
    """An observer that keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["loss"])

    def evaluation(self, step: int, loss: float, *, blocked: bool) -> None: ...

    def event(self, name: str, step: int, text: str) -> None: ...


def train(name: str, runs_dir: Path, data_path: str, *, resume: bool) -> tuple[list[float], Tables]:
    """Losses of the last steps and this rank's rows and row states as of step SAVED, by logical row.

    Saves at that step, or starts from what was saved there.
    """
    from dataclasses import asdict

    from megamem.parallel import groups as parallel_groups
    from megamem_launch.compose import build_parts, checkpoint_meta, open_data
    from megamem_launch.run import _restore, make_trainer
    from megamem_launch.validate import validate

    with tempfile.TemporaryDirectory() as disk:
        settings = [f"data.path={data_path}", f"runs_dir={runs_dir}", f"memory.disk.path={disk}/{dist.get_rank()}"]
        config = load_config(None, [*COMMON, *LAYOUTS[name][1], *settings])
        layout = validate(config, dist.get_world_size())
        data = open_data(config)
        groups = parallel_groups.initialize(layout, seed=config.train.seed)
        parts = build_parts(config, data, groups)
        recorder, tables = Recorder(), {}

        def read_tables() -> Tables:
            return {
                name: (
                    table.placement.logical(np.arange(table.start, table.stop)),
                    table.read(table.start, table.stop),
                )
                for name, table in parts.memory.tables.items()
            }

        def save(step: int) -> None:
            if step == SAVED:
                tables.update(read_tables())
                parts.checkpointer.save(
                    step,
                    entries=parts.entries,
                    state_of=parts.zero.full_state,
                    tables=parts.memory.tables,
                    meta=checkpoint_meta(parts, asdict(trainer.progress), trainer.guard.state_dict()),
                )

        if resume:
            progress = _restore(parts)[0]
            assert progress.step == SAVED
            tables.update(read_tables())
            trainer = make_trainer(parts, recorder, save=lambda step: None, progress=progress)
        else:
            trainer = make_trainer(parts, recorder, save=save)
            trainer.checkpoint_interval = SAVED
        trainer.run()
        parts.close()
        parallel_groups.destroy()
    return recorder.losses[-(STEPS - SAVED) :], tables


def whole(results: list[tuple[list[float], Tables]]) -> dict[str, dict[str, torch.Tensor]]:
    """Rows and states of whole tables, in the order of logical rows, from the parts of all ranks."""
    parts: dict[str, list[tuple[np.ndarray, dict[str, torch.Tensor]]]] = {}
    for _, tables in results:
        for name, part in tables.items():
            parts.setdefault(name, []).append(part)
    joined = {}
    for name, pieces in parts.items():
        order = np.argsort(np.concatenate([rows for rows, _ in pieces]))
        assert order.size == np.unique(order).size
        joined[name] = {key: torch.cat([values[key] for _, values in pieces])[order] for key in pieces[0][1]}
    return joined


@pytest.fixture(scope="module")
def sources(prepared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs that save, made once for each layout when it is first asked for: where they are, what they did and had."""
    made: dict[str, tuple[Path, list[float], dict[str, dict[str, torch.Tensor]]]] = {}

    def source(name: str) -> tuple[Path, list[float], dict[str, dict[str, torch.Tensor]]]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            results = run_distributed(train, LAYOUTS[name][0], name, folder, str(prepared_tiny), resume=False)
            made[name] = folder, results[0][0], whole(results)
        return made[name]

    return source


def assert_goes_on(source: str, target: str, sources: Any, data: Path) -> None:
    folder, losses, tables = sources(source)
    assert len(losses) == STEPS - SAVED
    results = run_distributed(train, LAYOUTS[target][0], target, folder, str(data), resume=True)
    for mine, _ in results:
        assert mine == pytest.approx(losses, rel=1e-5)
    loaded = whole(results)
    assert loaded.keys() == tables.keys()
    for name, expected in tables.items():
        assert loaded[name].keys() == expected.keys()
        assert expected["state.touched"].any() and not expected["state.touched"].all()
        for key, value in expected.items():
            assert torch.equal(loaded[name][key], value), f"{key} of {name}"


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{a}--{b}" for a, b in PAIRS])
def test_next_steps_are_those_of_the_run_that_was_not_resharded(
    source: str, target: str, sources: Any, prepared_tiny: Path
) -> None:
    assert_goes_on(source, target, sources, prepared_tiny)


GRID = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b and (a, b) not in PAIRS]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), GRID, ids=[f"{a}--{b}" for a, b in GRID])
def test_every_pair_of_layouts(source: str, target: str, sources: Any, prepared_tiny: Path) -> None:
    assert_goes_on(source, target, sources, prepared_tiny)
