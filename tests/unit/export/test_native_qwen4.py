"""Native export to Qwen4-Exp: transformers' own model computes what a plain decoder with Engram computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megamem.config.base import to_dict
from megamem.errors import ExportError
from megamem.memory.config import EngramConfig, MemoryConfig
from megamem.memory.hashing import hash_specs
from megamem.models.config import ModelConfig, MoEConfig
from megamem_checkpoints.hf import source as source_module
from megamem_checkpoints.hf.export import check_plan
from megamem_checkpoints.hf.native import qwen4_exp
from megamem_checkpoints.hf.native.qwen4_exp_conditions import conditions
from megamem_checkpoints.hf.source import Source
from megamem_checkpoints.hf.targets import plan_export
from megamem_kernels.ngram_hash import ngram_hash

VOCAB, EOS = 300, 2


class Stored:
    """A checkpoint in memory: canonical tensors of random weights, large enough that every part of the model matters."""

    step = 1

    def __init__(self, model: ModelConfig, memory: MemoryConfig) -> None:
        generator = torch.Generator().manual_seed(11)

        def draw(*shape: int) -> Tensor:
            # bf16 values: whatever the export rounds is rounded already, so its bf16 arithmetic can be compared exactly
            scale = 0.3 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
            return (torch.randn(*shape, generator=generator) * scale).bfloat16().float()

        h, d, moe, engram = model.hidden_size, model.head_dim, model.moe, memory.engram
        self.meta: dict[str, Any] = {
            "precision": "fp32",
            "eos_id": EOS,
            "config": {"model": to_dict(model), "memory": to_dict(memory), "data": {"seq_length": 64}},
        }
        self.dense = {
            "embedding.word_embeddings.weight": draw(model.padded_vocab_size, h),
            "decoder.final_layernorm.weight": draw(h),
        }
        if model.untie_embeddings_and_output_weights:
            self.dense["output_layer.weight"] = draw(model.padded_vocab_size, h)
        for layer in range(model.num_layers):
            here = f"decoder.layers.{layer}."
            width = (model.num_attention_heads + 2 * model.num_query_groups) * d
            self.dense |= {
                f"{here}input_layernorm.weight": draw(h),
                f"{here}self_attention.linear_qkv.weight": draw(width, h),
                f"{here}self_attention.linear_proj.weight": draw(h, model.num_attention_heads * d),
                f"{here}self_attention.q_layernorm.weight": draw(d),
                f"{here}self_attention.k_layernorm.weight": draw(d),
                f"{here}pre_mlp_layernorm.weight": draw(h),
            }
            feed_forward = {"": model.ffn_hidden_size}
            if moe.layers:
                self.dense[f"{here}mlp.router.weight"] = draw(moe.num_experts, h)
                feed_forward = {f"experts.{expert}.": moe.ffn_hidden_size for expert in range(moe.num_experts)}
                if moe.shared_expert_hidden_size:
                    feed_forward["shared_experts."] = moe.shared_expert_hidden_size
            for name, size in feed_forward.items():
                self.dense |= {
                    f"{here}mlp.{name}linear_fc1.gate.weight": draw(size, h),
                    f"{here}mlp.{name}linear_fc1.up.weight": draw(size, h),
                    f"{here}mlp.{name}linear_fc2.weight": draw(h, size),
                }
        self.memory = {}
        for layer, spec in hash_specs(engram, model.vocab_size).items():
            here, width = f"decoder.layers.{layer}.engram.", len(engram.orders) * engram.heads * engram.width
            self.memory[f"{here}table"] = draw(spec.rows, engram.width)
            self.dense |= {f"{here}{name}_proj.weight": draw(h, width) for name in ("key", "value")}
            self.dense |= {f"{here}norm_{name}.weight": draw(h) for name in ("key", "query")}
            if engram.conv_kernel_size:
                self.dense |= {
                    f"{here}norm_conv.weight": draw(h),
                    f"{here}conv.weight": draw(h, engram.conv_kernel_size),
                }

    def names(self) -> list[str]:
        return sorted(self.dense)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.dense[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self.dense[name].clone()

    def tables(self) -> dict[str, tuple[int, int]]:
        return {name: (table.shape[0], table.shape[1]) for name, table in self.memory.items()}

    def format(self, table: str) -> Any:
        return "fp32"

    def stored_rows(self, table: str, start: int, stop: int) -> dict[str, Tensor]:
        return {"rows": self.memory[table][start:stop]}

    def verify(self) -> None:
        raise AssertionError("a plan does not verify")


class Plain:
    """The model as its configuration says, from canonical tensors. Only n-grams start afresh after the end of a document.

    Rounds to ``dtype`` where transformers' Qwen4-Exp does: the router and the gate are not computed in fp32 there.
    """

    def __init__(self, stored: Stored, model: ModelConfig, engram: EngramConfig, dtype: torch.dtype) -> None:
        self.w = {name: tensor.to(dtype) for name, tensor in (stored.dense | stored.memory).items()}
        self.model, self.engram, self.dtype = model, engram, dtype
        self.specs = hash_specs(engram, model.vocab_size)

    def norm(self, x: Tensor, name: str) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.model.norm_epsilon)
        return (y * (1.0 + self.w[name].float())).to(x.dtype)

    def logits(self, tokens: Tensor) -> Tensor:
        h = F.embedding(tokens, self.w["embedding.word_embeddings.weight"])
        for layer in range(self.model.num_layers):
            here = f"decoder.layers.{layer}."
            if layer in self.specs:
                h = h + self.memory(h, tokens, layer, f"{here}engram.")
            h = h + self.attention(self.norm(h, f"{here}input_layernorm.weight"), f"{here}self_attention.")
            h = h + self.feed_forward(self.norm(h, f"{here}pre_mlp_layernorm.weight"), f"{here}mlp.")
        head = "output_layer" if self.model.untie_embeddings_and_output_weights else "embedding.word_embeddings"
        return F.linear(
            self.norm(h, "decoder.final_layernorm.weight"), self.w[f"{head}.weight"][: self.model.vocab_size]
        )

    def memory(self, h: Tensor, tokens: Tensor, layer: int, here: str) -> Tensor:
        spec = self.specs[layer]
        rows = ngram_hash(
            tokens.numpy(),
            documents_of(tokens).numpy(),
            multipliers=spec.multipliers,
            primes=spec.primes,
            offsets=spec.offsets,
            pad_id=EOS,
        )
        e = F.embedding(torch.from_numpy(rows), self.w[f"{here}table"]).flatten(-2)
        key = self.norm(F.linear(e, self.w[f"{here}key_proj.weight"]), f"{here}norm_key.weight")
        query = self.norm(h, f"{here}norm_query.weight")
        score = (key * query).sum(-1, keepdim=True) / math.sqrt(h.shape[-1])
        score = score.abs().clamp_min(1e-6).sqrt() * score.sign()
        u = score.sigmoid() * F.linear(e, self.w[f"{here}value_proj.weight"])
        if not self.engram.conv_kernel_size:
            return u
        dilation, weight = max(self.engram.orders), self.w[f"{here}conv.weight"]
        x = F.pad(self.norm(u, f"{here}norm_conv.weight").transpose(1, 2), (dilation * (weight.shape[1] - 1), 0))
        return u + F.silu(F.conv1d(x, weight[:, None], groups=len(weight), dilation=dilation)).transpose(1, 2)

    def attention(self, x: Tensor, here: str) -> Tensor:
        groups, d = self.model.num_query_groups, self.model.head_dim
        per_group = self.model.num_attention_heads // groups
        weight = self.w[f"{here}linear_qkv.weight"].view(groups, per_group + 2, d, -1)
        q, k, v = (
            F.linear(x, part.flatten(0, 2)).unflatten(-1, (-1, d))
            for part in (weight[:, :-2], weight[:, -2:-1], weight[:, -1:])
        )
        q = self.rotate(self.norm(q, f"{here}q_layernorm.weight").transpose(1, 2))
        k = self.rotate(self.norm(k, f"{here}k_layernorm.weight").transpose(1, 2))
        k, v = (y.repeat_interleave(per_group, dim=1) for y in (k, v.transpose(1, 2)))
        scores = (q @ k.transpose(2, 3) * d**-0.5).masked_fill(
            ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), torch.finfo(x.dtype).min
        )
        y = scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ v
        return F.linear(y.transpose(1, 2).flatten(2), self.w[f"{here}linear_proj.weight"])

    def rotate(self, x: Tensor) -> Tensor:
        model = self.model
        rope = RotaryEmbedding(
            model.head_dim,
            rotary_percent=1.0,
            rotary_base=model.rotary_base,
            rope_scaling=model.rope_scaling_factor != 1,
            rope_scaling_factor=model.rope_scaling_factor,
            use_cpu_initialization=True,
        )
        angles = torch.arange(x.shape[2]).float()[:, None] * rope.inv_freq
        cos, sin = (torch.cat([y, y], dim=-1).to(x.dtype) for y in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def feed_forward(self, x: Tensor, here: str) -> Tensor:
        moe, tokens = self.model.moe, x.flatten(0, 1)
        if not moe.layers:
            return self.swiglu(x, here)
        scores, experts = (
            F.linear(tokens, self.w[f"{here}router.weight"]).softmax(-1, dtype=torch.float32).topk(moe.router_topk)
        )
        if moe.router_topk > 1:
            scores = scores / scores.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for expert in range(moe.num_experts):
            token, slot = torch.where(experts == expert)
            share = self.swiglu(tokens[token], f"{here}experts.{expert}.") * scores[token, slot, None].to(x.dtype)
            out.index_add_(0, token, share)
        if moe.shared_expert_hidden_size:
            out = out + self.swiglu(tokens, f"{here}shared_experts.")
        return out.view_as(x)

    def swiglu(self, x: Tensor, here: str) -> Tensor:
        gate, up = (F.linear(x, self.w[f"{here}linear_fc1.{name}.weight"]) for name in ("gate", "up"))
        return F.linear(F.silu(gate) * up, self.w[f"{here}linear_fc2.weight"])


def documents_of(tokens: Tensor) -> Tensor:
    ends = (tokens == EOS).int()
    return (ends.cumsum(1) - ends).int()


def backbone(**changes: Any) -> ModelConfig:
    sizes = {"num_layers": 3, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 6, "num_query_groups": 2}
    return ModelConfig(**(sizes | {"vocab_size": VOCAB, "make_vocab_size_divisible_by": 64} | changes))


def experts(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"layers": [0, 1, 2], "num_experts": 5, "router_topk": 2, "ffn_hidden_size": 16} | changes))


def engram(**changes: Any) -> MemoryConfig:
    return MemoryConfig(
        engram=EngramConfig(**({"layers": [1], "heads": 2, "width": 3, "rows_per_head": 211} | changes))
    )


CASES = {
    "moe-N3": (backbone(moe=experts(), kv_channels=8), engram()),
    "dense-N2-untied": (
        backbone(untie_embeddings_and_output_weights=True, rotary_base=500.0),
        engram(orders=[2], conv_kernel_size=2),
    ),
    "shared-N4-two-engrams": (
        backbone(moe=experts(shared_expert_hidden_size=7, router_topk=3)),
        engram(layers=[0, 2], orders=[2, 3, 4], seed=3),
    ),
    "top1-adjacent-engrams-without-conv": (
        backbone(moe=experts(router_topk=1)),
        engram(layers=[1, 2], conv_kernel_size=0),
    ),
    "dense-N3-long-conv": (
        backbone(norm_epsilon=1e-4, rope_scaling_factor=8.0, kv_channels=32),
        engram(conv_kernel_size=5, heads=3),
    ),
}


def source(model: ModelConfig, memory: MemoryConfig, dtype: torch.dtype = torch.float32) -> Source:
    missing = Path("/nonexistent")
    return Source(Stored(model, memory), model, memory, tokenizer=missing, clusters=missing, dtype=dtype)


def write(source: Source, folder: Path, **options: Any) -> Any:
    """The planned model, checked for completeness, as transformers opens it."""
    plan = plan_export("qwen4_exp", source, options)
    check_plan(plan, source)
    assert plan.dropped == {} and plan.code == ()
    weights = {tensor.name: torch.cat(list(tensor.pieces())) for tensor in plan.tensors}
    assert {tensor.name: (tensor.shape, tensor.dtype) for tensor in plan.tensors} == {
        name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()
    }
    plan.config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


def load(folder: Path, **settings: Any) -> Any:
    model, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(problems.values())
    assert type(model).__module__.startswith("transformers.models.qwen4_exp")
    return model.eval()


def tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(EOS + 1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_plain_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, memory = CASES[name]
    assert conditions(model, memory, eos_id=EOS) == []
    given = source(model, memory, dtype)
    write(given, tmp_path)
    native = load(tmp_path, attn_implementation="eager", experts_implementation="eager")  # sums in the order of Plain
    assert native.dtype == dtype
    ids = tokens()
    ours = Plain(given.reader, model, memory.engram, dtype).logits(ids)
    theirs = native(ids, use_cache=False).logits
    assert ours.abs().max() > 1
    if dtype == torch.bfloat16:
        assert torch.equal(theirs, ours)
    else:
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    native.model.layers[native.config.ple_layer_ids[0] - 1].ple = None
    assert (native(ids, use_cache=False).logits - ours).abs().max() > 0.1  # the memory matters


@torch.no_grad()
def test_generation_with_cache_and_left_padding(tmp_path: Path) -> None:
    model, memory = CASES["shared-N4-two-engrams"]
    given = source(model, memory)
    native = write(given, tmp_path)
    plain = Plain(given.reader, model, memory.engram, torch.float32)
    ids = tokens(1, 21)
    ids[0, 9] = EOS
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, plain.logits(expected)[:, -1:].argmax(-1)], dim=1)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for use_cache in (True, False):
        assert torch.equal(
            native.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **settings), expected
        )
    padded = torch.cat([torch.full((1, 5), EOS), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    batch, masks = torch.cat([padded, tokens(1, 26)]), torch.cat([mask, torch.ones(1, 26, dtype=torch.int64)])
    assert torch.equal(native.generate(batch, attention_mask=masks, **settings)[0, 5:], expected[0])


@torch.no_grad()
def test_tables_in_many_shards_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (source_module, qwen4_exp):
        monkeypatch.setattr(module, "PIECE_BYTES", 4 * 3 * 13)  # 13 rows
    given = source(*CASES["shared-N4-two-engrams"], torch.bfloat16)
    native = write(given, tmp_path / "ours", table_files=12)
    planned = plan_export("qwen4_exp", given, {"table_files": 12}).tensors
    shards = [tensor for tensor in planned if ".ngram_embedding." in tensor.name]
    assert [tensor.file for tensor in shards] == [*range(12), *range(12)]
    assert max(len(piece) for tensor in shards for piece in tensor.pieces()) == 13
    for layer, place in ((0, 0), (2, 3)):
        table = given.reader.memory[f"decoder.layers.{layer}.engram.table"]
        loaded = native.model.layers[place].ple.ple_embedding.ngram_embedding.weight
        assert len(table) % 12 and len(loaded) == len(table) + 12 - len(table) % 12
        assert torch.equal(loaded[: len(table)].float(), table) and not loaded[len(table) :].any()
    native.save_pretrained(tmp_path / "theirs")
    ours, theirs = (safe_open(tmp_path / name / "model.safetensors", "pt") for name in ("ours", "theirs"))
    assert sorted(ours.keys()) == sorted(theirs.keys())
    assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in ours.keys())  # noqa: SIM118


def test_index_covers_the_training_length() -> None:
    model, memory = CASES["moe-N3"]
    for length, budget in ((64, 2048), (2049, 8192), (8193, 8196)):
        given = source(model, memory)
        given.meta["config"]["data"]["seq_length"] = length
        config = qwen4_exp.plan(given).config
        assert (config.max_position_embeddings, config.indexer_budget) == (length, budget)


def test_a_model_that_does_not_fit_is_refused_with_every_reason() -> None:
    model, memory = CASES["moe-N3"]
    memory = MemoryConfig(engram=EngramConfig(layers=[1], fold_tokens=True, pad_id=5, sqrt_gate=False))
    with pytest.raises(ExportError) as caught:
        qwen4_exp.plan(source(model, memory))
    sentence, *found = str(caught.value).splitlines()
    assert "--to megamem" in sentence
    assert [line.split()[1] for line in found] == [
        f"memory.engram.{name}" for name in ("fold_tokens", "pad_id", "sqrt_gate")
    ]
    with pytest.raises(ExportError, match="table_files is 0; set at least 1"):
        qwen4_exp.plan(source(*CASES["moe-N3"]), table_files=0)


@pytest.mark.parametrize("missing", ["decoder.layers.1.engram.table", "decoder.layers.0.mlp.router.weight"])
def test_a_missing_tensor_is_no_zero(missing: str) -> None:
    given = source(*CASES["moe-N3"])
    for tensors in (given.reader.dense, given.reader.memory):
        tensors.pop(missing, None)
    with pytest.raises(ExportError, match=r"the checkpoint gives no value for model\.layers\."):
        check_plan(qwen4_exp.plan(given), given)


def test_a_tensor_without_a_rule_is_refused() -> None:
    given = source(*CASES["moe-N3"])
    given.reader.dense["decoder.layers.0.mlp.router.expert_bias"] = torch.zeros(5)
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.gate\.e_score_correction_bias has no place in a Qwen4-Exp"):
        qwen4_exp.plan(given)
