"""Canonical names, shards and layout-independent initial weights, on models of one process and on the meta device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.models.canonical import CanonicalEntry, canonical_entries, gather, global_shape, shard
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.gpt import build_model
from megamem.parallel.groups import Groups, destroy, init_distributed, initialize
from megamem.parallel.layout import Layout

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
    make_vocab_size_divisible_by=8,
    moe=MoEConfig(layers=[1], num_experts=3, ffn_hidden_size=20, router="sigmoid_bias", shared_expert_hidden_size=12),
)
MEMORY = MemoryConfig(
    engram=EngramConfig(layers=[1], heads=2, width=4, rows_per_head=10), bank=BankConfig(layers=[0], units=[2])
)
ATTENTION = {
    "input_layernorm.weight": (24,),
    "self_attention.linear_proj.weight": (24, 24),
    "self_attention.linear_qkv.weight": (48, 24),
    "self_attention.q_layernorm.weight": (6,),
    "self_attention.k_layernorm.weight": (6,),
    "pre_mlp_layernorm.weight": (24,),
}
SHAPES = {
    "embedding.word_embeddings.weight": (56, 24),
    **{f"decoder.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in ATTENTION.items()},
    "decoder.layers.0.mlp.linear_fc1.gate.weight": (40, 24),
    "decoder.layers.0.mlp.linear_fc1.up.weight": (40, 24),
    "decoder.layers.0.mlp.linear_fc2.weight": (24, 40),
    "decoder.layers.1.mlp.router.weight": (3, 24),
    "decoder.layers.1.mlp.router.expert_bias": (3,),
    **{
        f"decoder.layers.1.mlp.{mlp}.{name}.weight": shape
        for mlp, units in (("experts.0", 20), ("experts.1", 20), ("experts.2", 20), ("shared_experts", 12))
        for name, shape in (
            ("linear_fc1.gate", (units, 24)),
            ("linear_fc1.up", (units, 24)),
            ("linear_fc2", (24, units)),
        )
    },
    "decoder.layers.1.engram.key_proj.weight": (24, 16),
    "decoder.layers.1.engram.value_proj.weight": (24, 16),
    "decoder.layers.1.engram.norm_key.weight": (24,),
    "decoder.layers.1.engram.norm_query.weight": (24,),
    "decoder.layers.1.engram.norm_conv.weight": (24,),
    "decoder.layers.1.engram.conv.weight": (24, 4),
    "decoder.final_layernorm.weight": (24,),
}


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    init_distributed()
    yield initialize(Layout(), seed=0)
    destroy()
    dist.destroy_process_group()


def build(groups: Groups, model: ModelConfig = MODEL, *, seed: int = 3, device: str = "cpu", dtype=torch.float32):
    return build_model(
        model, MEMORY, groups=groups, seq_length=8, dtype=dtype, seed=seed, sequence_parallel=False, device=device
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("untied", [False, True])
def test_names_and_shapes(groups: Groups, device: str, untied: bool) -> None:
    model = dataclasses.replace(MODEL, untie_embeddings_and_output_weights=untied)
    gpt = build(groups, model, device=device)
    entries = canonical_entries(gpt, groups)
    expected = SHAPES | ({"output_layer.weight": (56, 24)} if untied else {})
    assert {entry.name: global_shape(entry, groups) for entry in entries} == expected
    assert {entry.tensor.device.type for entry in entries} == {device}
    assert not any(entry.is_copy for entry in entries)
    covered = sum(entry.local.numel() for entry in entries if isinstance(entry.tensor, nn.Parameter))
    assert covered == sum(parameter.numel() for parameter in gpt.parameters())


def test_every_element_is_covered_once(groups: Groups) -> None:
    gpt = build(groups)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.zero_()
        for entry in canonical_entries(gpt, groups):
            entry.local.add_(1)
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in gpt.parameters())


def test_gate_is_the_half_that_goes_through_silu(groups: Groups) -> None:
    gpt = build(groups)
    mlp = gpt.decoder.layers[0].mlp
    up = next(e for e in canonical_entries(gpt, groups) if e.name.endswith("0.mlp.linear_fc1.up.weight"))
    with torch.no_grad():
        up.local.fill_(1)
        x = torch.randn(3, 1, 24)
        gate = mlp.linear_fc1.weight[:40]
        hidden = nn.functional.silu(x @ gate.T) * x.sum(-1, keepdim=True)
        torch.testing.assert_close(mlp(x)[0], hidden @ mlp.linear_fc2.weight.T)


def test_tensors_without_a_name_are_named(groups: Groups) -> None:
    gpt = build(groups)
    gpt.decoder.layers[0].self_attention.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.self_attention\.extra\.weight has no canonical name"):
        canonical_entries(gpt, groups)
    gpt = build(groups)
    gpt.decoder.layers[1].mlp.register_buffer("statistics", torch.zeros(2))
    with pytest.raises(ValueError, match=r"mlp.statistics has no canonical name"):
        canonical_entries(gpt, groups)


def test_two_tensors_with_one_name_are_refused(groups: Groups) -> None:
    gpt = build(groups)
    gpt.decoder.layers[1].layer_number = 1
    with pytest.raises(ValueError, match=r"share the canonical name decoder\.layers\.0\.input_layernorm\.weight"):
        canonical_entries(gpt, groups)


def test_initial_weights_follow_the_rule(groups: Groups) -> None:
    model = dataclasses.replace(MODEL, hidden_size=64, ffn_hidden_size=160, num_layers=2)
    for entry in canonical_entries(build(groups, model), groups):
        values, name = entry.local, entry.name
        if values.ndim == 1 or name.endswith("conv.weight"):
            assert values.abs().max() == 0, name
            continue
        std = 0.02 / math.sqrt(4) if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.02
        error = 4 / math.sqrt(2 * values.numel())  # four standard errors of a standard deviation
        assert values.std().item() == pytest.approx(std, rel=error), name
        assert abs(values.mean().item()) < 4 * std / math.sqrt(values.numel()), name


def test_initial_weights_depend_on_seed_and_name_alone(groups: Groups) -> None:
    torch.manual_seed(1)
    first = {e.name: e.local.clone() for e in canonical_entries(build(groups), groups)}
    torch.manual_seed(2)
    again = {e.name: e.local for e in canonical_entries(build(groups), groups)}
    other = {e.name: e.local for e in canonical_entries(build(groups, seed=4), groups)}
    half = {e.name: e.local for e in canonical_entries(build(groups, dtype=torch.bfloat16), groups)}
    drawn = [name for name, value in first.items() if value.abs().max() > 0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name].to(half[name].dtype), half[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    gate, up = (first[f"decoder.layers.0.mlp.linear_fc1.{part}.weight"] for part in ("gate", "up"))
    assert not torch.equal(gate, up)


def test_shards_of_an_entry(groups: Groups) -> None:
    full = torch.arange(24.0).view(4, 6)
    for name, layout in (
        ("x", Layout(2, tp=2)),
        ("x", Layout(2, tp=2, etp=1)),
        ("decoder.layers.0.mlp.shared_experts.linear_fc2.weight", Layout(2, tp=2, etp=1)),
        ("decoder.layers.0.mlp.experts.0.linear_fc2.weight", Layout(2, etp=2)),
    ):
        for tp_dim, expected in ((0, full[2:]), (1, full[:, 3:]), (None, full)):
            second = dataclasses.replace(groups, layout=layout, coordinates=layout.coordinates(1))
            entry = CanonicalEntry(name, expected.clone(), slice(0, expected.shape[0]), tp_dim)
            assert global_shape(entry, second) == (4, 6)
            assert torch.equal(shard(entry, full, second), expected)
    assert gather(entry, full, groups) is full


def test_experts_are_split_by_their_own_tensor_parallelism(groups: Groups) -> None:
    layout = Layout(2, tp=2, etp=1)
    second = dataclasses.replace(groups, layout=layout, coordinates=layout.coordinates(1))
    whole = torch.arange(24.0).view(4, 6)
    entry = CanonicalEntry("decoder.layers.0.mlp.experts.3.linear_fc1.up.weight", whole, slice(0, 4), 0)
    assert entry.is_expert
    assert global_shape(entry, second) == (4, 6)
    assert torch.equal(shard(entry, whole, second), whole)
    assert gather(entry, whole, second) is whole
