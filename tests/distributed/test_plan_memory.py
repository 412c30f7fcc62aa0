"""What the planner says without building anything, against ranks that were built: names, counts and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamem.testing.distributed import run_distributed

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
_TP, _PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
LAYOUTS: list[tuple[int, list[str]]] = [
    (1, ["optimizer.zero_stage=0", "model.moe.router=sigmoid_bias", "memory.storage.format=fp8"]),
    (2, ["optimizer.zero_stage=2", "train.precision=bf16", "memory.storage.format=bf16"]),
    (4, [f"{_TP}=2", f"{_PP}=2", "parallel.sequence_parallel=true", "model.moe.shared_expert_hidden_size=32"]),
    (4, [f"{_PP}=2", "parallel.virtual_pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=2"]),
    (4, [f"{_TP}=2", "parallel.sequence_parallel=true", "parallel.context_parallel_size=2", "optimizer.zero_stage=2"]),
]


def built_and_planned(overrides: list[str]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from megamem.memory.optimizers import build_row_optimizer
    from megamem.memory.table import OwnedTable
    from megamem.models.gpt import build_model
    from megamem.observe.accounting import account
    from megamem.parallel.groups import initialize
    from megamem.parallel.layout import Layout
    from megamem.parallel.zero import ZeroEngine
    from megamem_launch.config import load_config
    from megamem_launch.plan.hardware import HardwareConfig
    from megamem_launch.plan.memory import model_tables, plan_memory, precision_on, stage_tables, work_of
    from megamem_launch.plan.parameters import stage_parameters

    config = load_config(CONFIG, ["model.vocab_size=1000", *overrides])
    layout = Layout.from_config(config.parallel, dist.get_world_size())
    groups = initialize(layout, seed=1)
    place, hardware = groups.coordinates, HardwareConfig()
    precision = precision_on(config, hardware)
    model = torch.nn.ModuleList(
        build_model(
            config.model,
            config.memory,
            groups=groups,
            seq_length=config.data.seq_length,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            seed=1,
            sequence_parallel=config.parallel.sequence_parallel,
            chunk=chunk,
        )
        for chunk in range(layout.vpp)
    )
    shapes = [(name, tuple(p.shape)) for chunk in model for name, p in chunk.named_parameters()]
    known = model_tables(config)
    state = build_row_optimizer(config.memory.optimizer)
    tables = [
        OwnedTable.create(
            spec,
            owners=layout.stage_size,
            owner=place.rank % layout.stage_size,
            seed=1,
            storage=config.memory.storage_of(spec.name),
            state_fields=state.state_fields(spec.width),
        )
        for spec in stage_tables(known, config, layout, place.pp)
    ]
    built = account(
        work_of(config, layout, hardware),
        model=config.model,
        memory=config.memory,
        layout=layout,
        stage=place.pp,
        dense=ZeroEngine(model, optimizer=config.optimizer, groups=groups, precision=precision).memory(),
        tables=tables,
    )
    (told,) = plan_memory(config, layout, hardware, tables=known, ranks=[place.rank])
    held = {key: size for key, size in told.held.items() if key != "saving_host"}
    planned = [(p.name, p.shape) for p in stage_parameters(config.model, config.memory, layout, place.pp)]
    return {"built": built, "planned": held, "shapes": shapes, "planned_shapes": planned, "peak": told.peak["host"]}


@pytest.mark.parametrize(("ranks", "overrides"), LAYOUTS)
def test_shapes_and_bytes_are_those_of_built_ranks(ranks: int, overrides: list[str]) -> None:
    for found in run_distributed(built_and_planned, ranks, overrides):
        assert found["planned_shapes"] == found["shapes"]
        assert found["planned"] == found["built"]
        lasting = sum(found["built"][f"{part}_host"] for part in ("parameters", "optimizer", "tables"))
        assert lasting < found["peak"]
