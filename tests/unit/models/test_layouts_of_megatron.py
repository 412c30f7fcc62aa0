"""Layouts that our checks let through are layouts that megatron-core takes, with the same layers in the same places."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.models.checks import check_model
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.specs import transformer_config
from megamem.parallel.layout import Layout


def model(layers: int) -> ModelConfig:
    return ModelConfig(num_layers=layers, vocab_size=64, moe=MoEConfig(layers=[0], num_experts=4, ffn_hidden_size=64))


def accepted(layers: int, *, world: int, **degrees: int) -> Layout | None:
    """The layout, if the checks take it for a model of ``layers`` layers."""
    try:
        layout = Layout(world, **degrees)
        check_model(model(layers), MemoryConfig(), layout, seq_length=64, sequence_parallel=layout.tp > 1)
    except ConfigError:
        return None
    return layout


def pipelines() -> Iterator[tuple[int, Layout]]:
    """Every way to lay 1 to 9 layers out over up to 4 stages of up to 3 chunks, with ends of up to 4 layers."""
    for layers, pp, vpp, first, last in product(range(1, 10), range(1, 5), range(1, 4), range(5), range(5)):
        if pp > 1 or (vpp, first, last) == (1, 0, 0):
            layout = accepted(layers, world=pp, pp=pp, vpp=vpp, first_stage_layers=first, last_stage_layers=last)
            if layout is not None:
                yield layers, layout


def test_layers_are_where_megatron_builds_them() -> None:
    seen = set()
    for layers, layout in pipelines():
        config = transformer_config(model(layers), layout, dtype=torch.float32, sequence_parallel=False)
        held = []
        for stage, chunk in product(range(layout.pp), range(layout.vpp)):
            vp_stage = chunk if layout.vpp > 1 else None
            start = get_transformer_layer_offset(config, vp_stage, stage)
            ours = layout.chunk_layers(layers, stage, chunk)
            assert ours == range(start, start + get_num_layers_to_build(config, vp_stage, stage)), (layers, layout)
            held += ours
        assert sorted(held) == list(range(layers))
        seen.add((layout.pp, layout.vpp, layout.first_stage_layers > 0, layout.last_stage_layers > 0))
    assert {(4, 2, False, False), (3, 2, True, False), (2, 2, True, True), (4, 1, True, True)} <= seen


def test_degrees_that_pass_the_checks_make_a_configuration() -> None:
    made = []
    for tp, ep, etp, cp, vpp in product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2), (1, 2)):
        layout = accepted(8, world=16, tp=tp, ep=ep, etp=etp, cp=cp, vpp=vpp, pp=2)
        if layout is not None:
            for recompute in ("none", "selective", "full"):
                config = transformer_config(
                    model(8), layout, dtype=torch.float32, sequence_parallel=tp > 1, recompute=recompute
                )
                assert config.expert_tensor_parallel_size == etp
            made.append((tp, ep, etp))
    assert {(2, 4, 1), (1, 2, 2), (4, 2, 2)} <= set(made)
    assert (1, 4, 4) not in made  # 16 places for experts on the 8 ranks of a stage
