"""Whole runs: how rows are kept and fetched changes neither losses nor one byte of a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamem.testing.distributed import run_distributed
from megamem_launch.config import load_config

STEPS = 8
COMMON = [
    "base=tiny",
    f"train.steps={STEPS}",
    "train.precision=fp32",
    "train.global_batch_size=4",
    "train.eval_batches=1",
    "train.eval_interval=3",
    "checkpoint.interval=0",
    "tracking.mlflow=false",
    "memory.engram.layers=[0, 3]",
]
DISK = "memory.storage.tier=disk"
SMALL_CACHE = "memory.disk.cache_gib=1e-4"
FORMS: dict[str, list[str]] = {
    "depth 1": ["memory.prefetch_depth=1"],
    "depth 3": ["memory.prefetch_depth=3"],
    "scrambled, depth 1": ["memory.placement=scrambled"],
    "shared memory": ["memory.host_memory=shared"],
    "device tier": ["memory.storage.tier=device"],
    "disk tier": [DISK, SMALL_CACHE],
    "disk tier, scrambled, depth 3": [DISK, SMALL_CACHE, "memory.placement=scrambled", "memory.prefetch_depth=3"],
    "only banks on disk": ["memory.tables=[{match: '*.bank.*', tier: disk}]", SMALL_CACHE],
    "two kernel threads, checksums": ["memory.threads=2", "memory.verify=full"],
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same records as bytes, ``[n, ...]``: every format compares and travels alike."""
    return tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8).clone()


def train(overrides: list[str], data_path: str, runs: str) -> tuple[list[float], list[float], dict[str, tuple]]:
    """Losses and norms of every step, and this rank's tables: logical rows, rows and state."""
    from megamem.parallel import groups as parallel_groups
    from megamem_launch.compose import build_parts, open_data
    from megamem_launch.run import make_trainer
    from megamem_launch.validate import validate

    config = load_config(None, [*COMMON, *overrides, f"data.path={data_path}", f"runs_dir={runs}"])
    layout = validate(config, dist.get_world_size())
    groups = parallel_groups.initialize(layout, seed=config.train.seed)
    losses: list[float] = []
    norms: list[float] = []

    class Recorder:
        def step(self, step: int, metrics: dict[str, float]) -> None:
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
            assert metrics["stale_rows"] == 0

        def evaluation(self, step: int, loss: float, *, blocked: bool) -> None:
            losses.append(loss)

        def event(self, name: str, step: int, text: str) -> None: ...

    parts = build_parts(config, open_data(config), groups)
    trainer = make_trainer(parts, Recorder(), save=lambda step: None)
    trainer.run()
    tables = {
        name: (
            table.placement.logical(np.arange(table.start, table.stop)),
            {key: bits(value) for key, value in table.read(table.start, table.stop).items()},
        )
        for name, table in parts.memory.tables.items()
    }
    parts.loader.close()
    parts.memory.close()
    parallel_groups.destroy()
    return losses, norms, tables


def whole(results: list) -> dict[str, torch.Tensor]:
    """Every table field in the order of logical rows."""
    joined = {}
    for name in results[0][2]:
        order = np.argsort(np.concatenate([tables[name][0] for _, _, tables in results]))
        for key in results[0][2][name][1]:
            joined[f"{name}/{key}"] = torch.cat([tables[name][1][key] for _, _, tables in results])[order]
    return joined


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_form_changes_one_bit(ranks: int, prepared_tiny: Path, tmp_path: Path) -> None:
    def run(name: str, form: list[str]) -> list:
        return run_distributed(train, ranks, form, str(prepared_tiny), str(tmp_path / name.replace(" ", "-")))

    reference = run("depth 0", ["memory.prefetch_depth=0"])
    losses, norms, _ = reference[0]
    tables = whole(reference)
    assert losses[-1] < losses[0]
    for name, form in FORMS.items():
        results = run(name, form)
        assert results[0][0] == losses and results[0][1] == norms, name
        for key, tensor in whole(results).items():
            assert torch.equal(tensor, tables[key]), (name, key)


@pytest.mark.parametrize("row_format", ["bf16", "fp8"])
def test_small_formats_train_and_do_not_depend_on_the_form(
    row_format: str, prepared_tiny: Path, tmp_path: Path
) -> None:
    forms = [["memory.prefetch_depth=0"], [DISK, SMALL_CACHE], ["memory.placement=scrambled"]]
    results = [
        run_distributed(
            train, 2, [f"memory.storage.format={row_format}", *form], str(prepared_tiny), str(tmp_path / str(i))
        )
        for i, form in enumerate(forms)
    ]
    assert results[0][0][0][-1] < results[0][0][0][0]
    tables = whole(results[0])
    for other in results[1:]:
        assert other[0][0] == results[0][0][0]
        for key, tensor in whole(other).items():
            assert torch.equal(tensor, tables[key]), key
