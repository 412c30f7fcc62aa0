"""One table of names, read both ways: nothing is lost, nothing is invented, no bit changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamem.errors import ExportError
from megamem.models.config import ModelConfig, MoEConfig
from megamem_checkpoints.hf.mapping import gather_names, map_names
from megamem_checkpoints.hf.mapping_rules import LAYERS, OnePlus
from megamem_checkpoints.hf.native.families import FAMILIES, conditions, config_of, family_of, model_of
from megamem_checkpoints.hf.native.memory_free import saved_shapes


def draw_model(draw: st.DrawFn, family: str) -> ModelConfig:
    groups, heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    layers = draw(st.integers(1, 3))
    moe = MoEConfig()
    if family in ("qwen3_moe", "mixtral"):
        some = draw(st.sets(st.integers(0, layers - 1), min_size=1))
        moe = MoEConfig(
            layers=list(range(layers)) if family == "mixtral" else sorted(some),
            num_experts=draw(st.integers(2, 5)),
            router_topk=2 if family == "mixtral" else draw(st.integers(1, 2)),
            ffn_hidden_size=draw(st.integers(1, 9)),
        )
    return ModelConfig(
        num_layers=layers,
        hidden_size=groups * heads * draw(st.integers(1, 5)),
        ffn_hidden_size=moe.ffn_hidden_size if family == "mixtral" else draw(st.integers(1, 9)),
        num_attention_heads=groups * heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        vocab_size=draw(st.integers(1, 300)),
        rotary_base=draw(st.sampled_from([1e4, 5e5])),
        rope_scaling_factor=draw(st.sampled_from([1.0, 8.0])),
        qk_layernorm=family.startswith("qwen3"),
        layernorm_zero_centered_gamma=False,
        untie_embeddings_and_output_weights=draw(st.booleans()),
        moe=moe,
    )


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_there_and_back_is_the_identity(family: str, data: st.DataObject) -> None:
    model = draw_model(data.draw, family)
    assert family_of(model) == family and conditions(family, model) == []
    config = config_of(family, model, eos_id=0, max_length=64)
    assert model_of(config) == model
    theirs = random(saved_shapes(config))
    ours = {item.name: item.join([theirs[part] for part in item.parts]) for item in gather_names(theirs, model, family)}
    assert ours["embedding.word_embeddings.weight"].shape == (model.padded_vocab_size, model.hidden_size)
    back = {weight.name: weight.part(ours[weight.source]) for weight in map_names(ours, model, family)}
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    again = {item.name: item.join([back[part] for part in item.parts]) for item in gather_names(back, model, family)}
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)


def test_zero_centred_norms_become_scales_for_other_models_alone() -> None:
    model = ModelConfig(vocab_size=8)
    name = "decoder.layers.3.self_attention.q_layernorm.weight"
    weight = torch.tensor([-0.25, 0.0, 3e-3])
    (kept,) = map_names([name], model)
    assert torch.equal(kept.part(weight), weight)
    (scale,) = map_names([name], model, "qwen3")
    assert torch.equal(scale.part(weight), 1 + weight) and scale.name == "model.layers.3.self_attn.q_norm.weight"
    torch.testing.assert_close(OnePlus().join([scale.part(weight)]), weight, rtol=0, atol=6e-8)
    model.layernorm_zero_centered_gamma = False
    (plain,) = map_names([name], model, "qwen3")
    assert plain.part(weight) is weight


def test_what_no_rule_covers_is_named() -> None:
    model = ModelConfig(vocab_size=8)
    with pytest.raises(ExportError, match=r"layers\.0\.engram\.table has no place in a llama model"):
        map_names(["decoder.layers.0.engram.table"], model, "llama")
    with pytest.raises(ExportError, match=r"tensor model\.layers\.0\.mlp\.gate\.weight is none that a llama model"):
        gather_names(["model.layers.0.mlp.gate.weight"], model, "llama")
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.v_proj\.weight is missing"):
        gather_names([f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk"], model, "llama")


@pytest.mark.parametrize("family", LAYERS)
def test_no_two_rules_meet(family: str) -> None:
    targets = list(LAYERS[family].values())
    assert len(set(targets)) == len(targets)
