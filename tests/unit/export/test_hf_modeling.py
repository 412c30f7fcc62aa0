"""The modelling code of an export: caches, padding, documents, memories, saving."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from megamem.memory.config import EngramConfig
from megamem.memory.hashing import hash_specs
from megamem_checkpoints.hf.remote_code.configuration_megamem import MegamemConfig
from megamem_checkpoints.hf.remote_code.modeling_megamem import (
    MegamemForCausalLM,
    MegamemNgramHash,
    MegamemTopKRouter,
)

VECTORS = Path(__file__).parents[2] / "data" / "engram_hash_testvectors.json"
EOS = 2
MOE = {
    "moe_layers": [1],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 8,
}
BANK = {"bank_layers": [0, 2], "bank_units": [3, 0, 2], "bank_branching": 4}
VARIANTS = {
    "dense": {},
    "plain_norms": {"zero_centered_norms": False},
    "untied": {"tie_word_embeddings": False, "qk_layernorm": False},
    "moe_softmax": MOE,
    "moe_top1": MOE | {"num_experts_per_tok": 1, "shared_expert_intermediate_size": 0},
    "moe_sigmoid": MOE | {"moe_router": "sigmoid_bias"},
    "engram": {"engram": {"layers": [0, 1]}},
    "engram_one_tap": {"engram": {"layers": [1], "conv_kernel_size": 1}},
    "engram_no_conv": {"engram": {"layers": [1], "conv_kernel_size": 0, "sqrt_gate": False, "orders": [2, 3, 4]}},
    "engram_folded": {"engram": {"layers": [1], "fold_tokens": True, "pad_id": 5}},
    "bank": BANK,
    "all": MOE | BANK | {"engram": {"layers": [1, 2]}, "router_dimensions": 6},
}


def build(variant: str = "all", **changes: object) -> MegamemForCausalLM:
    """A random model in which every part moves the logits."""
    settings = VARIANTS[variant] | changes
    engram = EngramConfig(**({"heads": 2, "width": 4, "rows_per_head": 23} | settings.pop("engram", {"layers": []})))
    specs = hash_specs(engram, 64)
    config = MegamemConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=EOS,
        engram_layers=engram.layers,
        engram_orders=engram.orders,
        engram_heads=engram.heads,
        engram_width=engram.width,
        engram_multipliers=[[str(m) for m in specs[layer].multipliers] for layer in engram.layers],
        engram_primes=[specs[layer].primes.ravel().tolist() for layer in engram.layers],
        engram_pad_id=EOS if engram.pad_id < 0 else engram.pad_id,
        engram_fold_tokens=engram.fold_tokens,
        engram_sqrt_gate=engram.sqrt_gate,
        engram_conv_kernel_size=engram.conv_kernel_size,
        **settings,
    )
    model = MegamemForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25, generator=generator)
        for name, buffer in model.named_buffers():
            if "memory_router" in name or "bias" in name:
                buffer.normal_(generator=generator)
    if model.model.token_fold is not None:
        model.model.token_fold.copy_(torch.arange(64) // 3)
    return model


def prompts(length: int = 23) -> torch.Tensor:
    """Two sequences; the first holds two documents, the second starts with an end of document."""
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(1))
    ids[0, 9] = ids[1, 0] = EOS
    return ids


def paths(model: MegamemForCausalLM) -> dict[str, torch.Tensor]:
    return {"memory_paths": torch.tensor([[1, 5, 22], [3, -1, 60]])} if model.config.bank_units else {}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones_in_any_pieces(variant: str) -> None:
    model, ids = build(variant), prompts()
    whole = model(ids, use_cache=False, **paths(model)).logits
    for size in (1, 3, 10):
        cache, pieces = DynamicCache(config=model.config), []
        for piece in ids.split(size, dim=1):
            pieces.append(model(piece, past_key_values=cache, **paths(model)).logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("variant", ["engram", "engram_no_conv", "engram_folded", "all"])
@torch.no_grad()
def test_left_padding_changes_nothing(variant: str) -> None:
    model, ids = build(variant), prompts()
    padded = torch.cat([torch.full((2, 5), 11), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    expected = model(ids, **paths(model)).logits
    torch.testing.assert_close(
        model(padded, attention_mask=mask, **paths(model)).logits[:, 5:], expected, rtol=1e-5, atol=2e-5
    )
    first = model(padded[:, :7], attention_mask=mask[:, :7], use_cache=True, **paths(model))
    rest = model(padded[:, 7:], attention_mask=mask, past_key_values=first.past_key_values, **paths(model))
    torch.testing.assert_close(rest.logits, expected[:, 2:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache": "static"}])
@torch.no_grad()
def test_generation_with_and_without_a_cache_is_the_same(options: dict[str, object]) -> None:
    model, ids = build("all"), prompts(12)
    memory = paths(model)
    if "prompt_lookup_num_tokens" in options:  # transformers speculates for one sequence at a time
        ids, memory = ids[:1].repeat(1, 2), {"memory_paths": memory["memory_paths"][:1]}
    settings = memory | {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    beams = {"num_beams": options.get("num_beams", 1)}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings, **beams)
    if options.get("cache") == "static":
        options = {"cache_implementation": "static", "disable_compile": True}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings, **options)
    assert torch.equal(found, expected)
    assert len(set(expected[0, ids.shape[1] :].tolist())) > 3

    padded = torch.cat([torch.zeros(len(ids), 3, dtype=ids.dtype), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings, **options)[:, 3:], expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_documents_are_apart_where_positions_start_again(implementation: str) -> None:
    model, ids = build("engram"), prompts()[:1]
    model.set_attn_implementation(implementation)
    expected = torch.cat([model(ids[:, :10]).logits, model(ids[:, 10:]).logits], dim=1)
    positions = torch.cat([torch.arange(10), torch.arange(13)])[None]
    found = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(model(ids).logits[:, 10:], expected[:, 10:], atol=1e-3)


@torch.no_grad()
def test_memory_does_not_look_into_the_previous_document() -> None:
    model, ids = build("engram"), prompts()
    engram = model.model.layers[0].engram
    hidden = torch.randn(1, 23, 32, generator=torch.Generator().manual_seed(3))
    whole = engram(hidden, ids[:1] + 1, None, None)
    alone = engram(hidden[:, 10:], ids[:1, 10:] + 1, None, None)
    torch.testing.assert_close(whole[:, 10:], alone, rtol=0, atol=0)
    changed = ids[:1].clone()
    changed[0, 8] += 1
    other = engram(hidden, changed + 1, None, None)
    assert not torch.equal(other[:, 8:10], whole[:, 8:10])
    assert torch.equal(other[:, 10:], whole[:, 10:])


def test_convolution_and_gate_follow_the_paper() -> None:
    model = build("engram")
    engram = model.model.layers[0].engram.double()
    ids = prompts()[:1]
    hidden = torch.randn(1, 23, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[0] * 10 + [1] * 13])
    history = engram.history
    rows = engram.hash(
        torch.cat([ids.new_zeros(1, history), ids], dim=1),
        torch.cat([documents.new_full((1, history), -1), documents], dim=1),
        None,
        23,
    )

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * (1 + weight)

    memory = engram.table.shard_0.weight[rows].flatten(2)
    key = norm(memory @ engram.key_proj.weight.T, engram.norm_key.weight)
    score = (norm(hidden, engram.norm_query.weight) * key).sum(-1) / 32**0.5
    gate = torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())
    value = gate[..., None] * (memory @ engram.value_proj.weight.T)
    normed = norm(value, engram.norm_conv.weight)
    expected = torch.empty_like(value)
    for position in range(23):
        taps = torch.zeros(32, dtype=torch.float64)
        for tap in range(4):
            source = position - 3 * (3 - tap)
            if source >= 0 and documents[0, source] == documents[0, position]:
                taps = taps + engram.conv_weight[:, tap] * normed[0, source]
        expected[0, position] = torch.nn.functional.silu(taps) + value[0, position]
    torch.testing.assert_close(engram(hidden, ids + 1, None, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text(encoding="utf-8")), ids=lambda case: case["name"][:12])
def test_rows_are_those_of_the_published_hash(case: dict) -> None:
    for layer, vectors in case["layers"].items():
        config = MegamemConfig(
            num_hidden_layers=max(case["layer_ids"]) + 1,
            engram_layers=[int(layer)],
            engram_orders=case["orders"],
            engram_heads=case["heads"],
            engram_multipliers=[vectors["multipliers"]],
            engram_primes=[np.array(vectors["primes"]).ravel().tolist()],
            engram_pad_id=case["pad_compressed_id"],
        )
        module = MegamemNgramHash(config, int(layer))
        ids = torch.tensor([vectors["test_compressed_ids"]])
        past = max(case["orders"]) - 1
        rows = module(
            torch.cat([ids.new_zeros(1, past), ids], dim=1),
            torch.cat([ids.new_full((1, past), -1), torch.zeros_like(ids)], dim=1),
            None,
            ids.shape[1],
        )
        assert rows[0].tolist() == vectors["global_row_ids"]


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("topk", [1, 2])
def test_expert_choice_is_that_of_megatron(sigmoid: bool, topk: int) -> None:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = MegamemConfig(
        num_experts=8, num_experts_per_tok=topk, moe_router="sigmoid_bias" if sigmoid else "softmax", hidden_size=16
    )
    router = MegamemTopKRouter(config)
    generator = torch.Generator().manual_seed(0)
    router.weight.data.normal_(generator=generator)
    if sigmoid:
        router.e_score_correction_bias.normal_(std=0.3, generator=generator)
    tokens = torch.randn(50, 16, generator=generator)
    weights, experts = router(tokens)
    expected, chosen = topk_routing_with_score_function(
        tokens @ router.weight.T,
        topk,
        use_pre_softmax=topk == 1 and not sigmoid,
        score_function="sigmoid" if sigmoid else "softmax",
        expert_bias=router.e_score_correction_bias if sigmoid else None,
    )
    found = torch.zeros(50, 8).scatter(1, experts, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found > 0, chosen.bool())


@torch.no_grad()
def test_bank_reads_the_blocks_of_each_path() -> None:
    model = build("bank")
    bank = model.model.layers[0].bank
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[1, 5, 22], [3, -1, -1]])
    expected = torch.zeros_like(x)
    for row, (first, third) in enumerate([(1, 22), (3, 64)]):
        for table, units, block in ((bank.level1, 3, first), (bank.level3, 2, third)):
            m1, m2, m3 = table.shard_0.weight[block].view(3, units, 32)
            expected[row] += (torch.nn.functional.silu(x[row] @ m1.T) * (x[row] @ m2.T)) @ m3
    torch.testing.assert_close(bank(x, chosen), expected, rtol=1e-5, atol=1e-5)
    generic = torch.full_like(chosen, -1)
    assert torch.equal(bank(x, None), bank(x, generic))


@torch.no_grad()
def test_route_descends_to_the_nearest_centroids() -> None:
    model, ids = build("all"), prompts()
    router = model.memory_router
    router.idf[EOS] = 0
    found = model.route(ids)
    for row in range(2):
        values, counts = np.unique(ids[row].numpy(), return_counts=True)
        point = router.components.double().numpy()[:, values] @ (
            (1 + np.log(counts)) * router.idf.double().numpy()[values]
        )
        point /= np.linalg.norm(point)
        node = 0
        for level in range(3):
            children = router.get_buffer(f"level{level + 1}_centroids")[node].double().numpy()
            node = node * 4 + int(np.square(point - children).sum(axis=1).argmin())
            assert found[row, level] == node
    padded, mask = torch.cat([ids[:, :1], ids], dim=1), torch.ones(2, 24, dtype=torch.int64)
    mask[:, 0] = 0
    assert torch.equal(model.route(padded, mask), found)
    with pytest.raises(ValueError, match="stores no router"):
        build("bank").route(ids)


def test_every_parameter_gets_a_gradient_with_and_without_checkpointing() -> None:
    model, ids = build("all", router_dimensions=0).train(), prompts()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, **paths(model)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", ["all", "engram_folded", "moe_sigmoid"])
@torch.no_grad()
def test_save_and_reload_keep_every_logit(variant: str, tmp_path: Path) -> None:
    model, ids = build(variant), prompts()
    model.save_pretrained(tmp_path)
    again = MegamemForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, **paths(model)).logits, model(ids, **paths(model)).logits)
    low = MegamemForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.model.embed_tokens.weight.dtype == torch.bfloat16
    kept = [b for name, b in low.named_buffers() if "memory_router" in name or "correction_bias" in name]
    assert all(buffer.dtype == torch.float32 for buffer in kept)


@torch.no_grad()
def test_attention_implementations_agree_and_outputs_are_recorded() -> None:
    model, ids = build("all"), prompts()
    expected = model(ids, **paths(model)).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True, **paths(model))
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=2e-5)
    assert len(output.hidden_states) == 4 and output.attentions[0].shape == (2, 4, 23, 23)
    kept = model(ids, logits_to_keep=1, **paths(model)).logits
    torch.testing.assert_close(kept[:, 0], expected[:, -1], rtol=1e-5, atol=2e-5)
