"""The backbone of one process against the same mathematics written plainly in float64."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel

from megamem.batch import MicroBatch
from megamem.errors import ConfigError
from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.models.attention import choose_backend, flash, sdpa
from megamem.models.canonical import canonical_entries
from megamem.models.checks import check_model
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.gpt import build_model
from megamem.models.micro import MicroContext
from megamem.models.norm import RMSNorm
from megamem.models.router import take_aux_loss, update_router_bias
from megamem.models.specs import transformer_config
from megamem.parallel.groups import Groups, destroy, init_distributed, initialize
from megamem.parallel.layout import Layout

SEED = 7


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    init_distributed()
    yield initialize(Layout(), seed=SEED)
    destroy()
    dist.destroy_process_group()


def small(**settings: object) -> ModelConfig:
    defaults: dict = {
        "num_layers": 2,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 50,
        "make_vocab_size_divisible_by": 8,
        "init_method_std": 0.3,  # large enough for attention and routing to differ visibly from uniform
    }
    return ModelConfig(**(defaults | settings))


MOE = {"layers": [1], "num_experts": 6, "router_topk": 2, "ffn_hidden_size": 20, "aux_loss_coeff": 0.3}
MODELS = {
    "tied": small(),
    "untied-wide-heads-without-qk-norm": small(
        untie_embeddings_and_output_weights=True, kv_channels=10, qk_layernorm=False, num_query_groups=4
    ),
    "softmax": small(moe=MoEConfig(**MOE)),
    "softmax-top1": small(moe=MoEConfig(**MOE | {"router_topk": 1})),
    "sigmoid-shared": small(moe=MoEConfig(**MOE, router="sigmoid_bias", shared_expert_hidden_size=12)),
    "softmax-shared-alltoall": small(
        moe=MoEConfig(**MOE | {"layers": [0, 1]}, shared_expert_hidden_size=12, token_dispatcher="alltoall")
    ),
}


def build(
    groups: Groups, model: ModelConfig, *, memory: MemoryConfig | None = None, dtype: torch.dtype = torch.float32
) -> GPTModel:
    memory = memory or MemoryConfig()
    gpt = build_model(model, memory, groups=groups, seq_length=32, dtype=dtype, seed=SEED, sequence_parallel=False)
    with torch.no_grad():  # norms and expert biases start at zero, where they would prove nothing
        generator = torch.Generator().manual_seed(1)
        for entry in canonical_entries(gpt, groups):
            if entry.tensor.ndim == 1:
                entry.local.copy_(torch.empty(entry.local.shape).normal_(0, 0.2, generator=generator))
    return gpt


def batch(b: int, s: int, lengths: list[list[int]] | None = None, vocabulary: int = 50) -> MicroBatch:
    """Random tokens in documents of ``lengths`` (one list per sequence)."""
    rng = np.random.default_rng(3)
    lengths = lengths or [[s]] * b
    ids, number = np.empty((b, s), np.int32), 0
    for row, parts in zip(ids, lengths, strict=True):
        assert sum(parts) == s
        row[:] = np.repeat(np.arange(number, number + len(parts)), parts)
        number += len(parts)
    tokens = rng.integers(0, vocabulary, (b, s + 1))
    return MicroBatch(
        sample_ids=np.arange(b),
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=np.ones((b, s), np.float32),
        document_ids=ids,
        document_paths=np.zeros((number, 0), np.int64),
    )


def run(gpt: GPTModel, micro: MicroBatch, *, labels: bool = True) -> torch.Tensor:
    b, s = micro.shape
    return gpt(
        torch.from_numpy(micro.tokens),
        torch.arange(s).expand(b, s),
        None,
        labels=torch.from_numpy(micro.labels) if labels else None,
        packed_seq_params=MicroContext.from_batch(micro, torch.device("cpu")),
    )


def reference(
    weights: dict[str, torch.Tensor], model: ModelConfig, micro: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[b, s, vocabulary]`` and the sum of auxiliary losses, in the dtype of ``weights``."""
    tokens = torch.from_numpy(micro.tokens)
    b, s = tokens.shape
    heads, kv, d = model.num_attention_heads, model.num_query_groups, model.head_dim
    documents = torch.from_numpy(micro.document_ids)
    visible = (documents[:, :, None] == documents[:, None, :]) & torch.ones(s, s).tril().bool()
    frequency = model.rotary_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = (torch.arange(s)[:, None] * frequency).repeat(1, 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + model.norm_epsilon).rsqrt()
        return x * scale * (1 + weights[name + ".weight"])

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [b, s, d]
        half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    def attend(x: torch.Tensor, name: str) -> torch.Tensor:
        qkv = x @ weights[name + "linear_qkv.weight"].T
        per_group = heads // kv
        outputs = []
        for head in range(heads):
            start = (head // per_group) * (per_group + 2) * d
            at = [start + (head % per_group) * d, start + per_group * d, start + (per_group + 1) * d]
            q, k, v = (qkv[..., i : i + d] for i in at)
            if model.qk_layernorm:
                q, k = norm(q, name + "q_layernorm"), norm(k, name + "k_layernorm")
            scores = rotate(q) @ rotate(k).transpose(1, 2) / math.sqrt(d)
            outputs.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ v)
        return torch.cat(outputs, -1) @ weights[name + "linear_proj.weight"].T

    def swiglu(x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up = (x @ weights[f"{name}linear_fc1.{part}.weight"].T for part in ("gate", "up"))
        return (F.silu(gate) * up) @ weights[name + "linear_fc2.weight"].T

    def experts(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.flatten(0, 1)
        logits = x @ weights[name + "router.weight"].T
        if model.moe.router == "sigmoid_bias":
            scores = logits.sigmoid()
            chosen = (scores + weights[name + "router.expert_bias"]).topk(model.moe.router_topk, dim=-1).indices
        else:
            scores = logits.softmax(-1)
            chosen = scores.topk(model.moe.router_topk, dim=-1).indices
        share = scores.gather(1, chosen)
        if model.moe.router_topk > 1:
            share = share / share.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(model.moe.num_experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            value = swiglu(x[token], f"{name}experts.{expert}.") * share[token, slot, None]
            out = out.index_add(0, token, value)
        if model.moe.shared_expert_hidden_size:
            out = out + swiglu(x, name + "shared_experts.")
        routed = F.one_hot(chosen, model.moe.num_experts).sum((0, 1)) / chosen.numel()
        balance = model.moe.num_experts * (routed * scores.mean(0)).sum()
        aux = balance * model.moe.aux_loss_coeff if model.moe.router == "softmax_aux_loss" else balance * 0
        return out.view(b, s, -1), aux

    x = weights["embedding.word_embeddings.weight"][tokens]
    aux = x.new_zeros(())
    for layer in range(model.num_layers):
        name = f"decoder.layers.{layer}."
        x = x + attend(norm(x, name + "input_layernorm"), name + "self_attention.")
        normed = norm(x, name + "pre_mlp_layernorm")
        if layer in model.moe.layers:
            delta, loss = experts(normed, name + "mlp.")
            x, aux = x + delta, aux + loss
        else:
            x = x + swiglu(normed, name + "mlp.")
    x = norm(x, "decoder.final_layernorm")
    output = "output_layer" if model.untie_embeddings_and_output_weights else "embedding.word_embeddings"
    return x @ weights[output + ".weight"].T, aux


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[[17], [17]], [[5, 1, 11], [17]]], ids=["whole", "packed"])
def test_logits_loss_and_gradients_equal_the_reference(groups: Groups, name: str, lengths: list[list[int]]) -> None:
    model = MODELS[name]
    gpt = build(groups, model)
    micro = batch(2, 17, lengths)
    entries = canonical_entries(gpt, groups)
    weights = {e.name: e.local.double().clone().requires_grad_(e.tensor.requires_grad) for e in entries}

    logits = run(gpt, micro, labels=False)
    expected, aux = reference(weights, model, micro)
    torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=1e-5)

    loss = run(gpt, micro)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), torch.from_numpy(micro.labels).flatten(), reduction="none")
    torch.testing.assert_close(loss.double().flatten(), expected_loss, atol=2e-5, rtol=1e-5)
    loss.mean().backward()
    (expected_loss.mean() + aux).backward()
    for entry in entries:
        if entry.tensor.requires_grad:
            gradient, wanted = entry.tensor.grad[entry.rows].double(), weights[entry.name].grad
            if wanted is None:  # an expert that no token reached
                wanted = torch.zeros_like(gradient)
            error = (gradient - wanted).norm() / wanted.norm().clamp(min=1e-6)
            assert error < 2e-5, f"gradient of {entry.name} is off by {error:.1e}"
    assert sum(float(e.tensor.grad.norm()) > 0 for e in entries if e.tensor.requires_grad) > len(entries) * 0.8


@pytest.mark.parametrize("name", ["tied", "softmax", "sigmoid-shared"])
def test_packed_documents_do_not_see_each_other(groups: Groups, name: str) -> None:
    gpt = build(groups, MODELS[name]).eval()
    first, second = 6, 11
    micro = batch(1, first + second, [[first, second]])
    packed = run(gpt, micro, labels=False)

    changed = batch(1, first + second, [[first, second]])
    changed.tokens[0, :first] = (changed.tokens[0, :first] + 1) % 50
    after = run(gpt, changed, labels=False)
    if name == "tied":
        assert torch.equal(packed[:, first:], after[:, first:])
    else:  # the other document changes how many tokens share an expert's matrix product, and so its rounding
        torch.testing.assert_close(packed[:, first:], after[:, first:], atol=1e-5, rtol=1e-5)
    assert (packed[:, :first] - after[:, :first]).abs().max() > 0.1

    kept: list[torch.Tensor] = []
    hook = gpt.embedding.word_embeddings.register_forward_hook(lambda _, __, out: out.retain_grad() or kept.append(out))
    run(gpt, micro)[:, first:].sum().backward()
    hook.remove()
    assert kept[0].grad[:, :first].abs().max() == 0
    assert kept[0].grad[:, first:].abs().max() > 0

    # RoPE positions run on through the sequence, and attention depends on their differences alone.
    for start, length in ((0, first), (first, second)):
        alone = batch(1, length)
        alone.tokens[:] = micro.tokens[:, start : start + length]
        expected = packed[:, start : start + length]
        torch.testing.assert_close(run(gpt, alone, labels=False), expected, atol=1e-5, rtol=1e-5)


def test_sequences_without_a_context_are_one_document_each(groups: Groups) -> None:
    gpt = build(groups, MODELS["tied"])
    micro = batch(2, 9)
    without = gpt(torch.from_numpy(micro.tokens), torch.arange(9).expand(2, 9), None)
    torch.testing.assert_close(without, run(gpt, micro, labels=False))


def test_layer_adds_memories_where_they_belong(groups: Groups) -> None:
    memory = MemoryConfig(
        engram=EngramConfig(layers=[1], heads=1, width=4, rows_per_head=9), bank=BankConfig(layers=[0], units=[2])
    )
    gpt = build(groups, MODELS["sigmoid-shared"], memory=memory).eval()
    first, second = gpt.decoder.layers
    assert first.engram is None and first.bank is not None
    assert second.engram is not None and second.bank is None

    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor, context: MicroContext) -> torch.Tensor:
            assert context.memory == "rows"
            return 2 * x

    for layer in (first, second):
        layer.engram = layer.bank = Double()
        x = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(2))
        context = MicroContext(document_ids=torch.tensor([[0] * 5, [1] * 5]), memory="rows")  # type: ignore[arg-type]
        out, _ = layer(x, attention_mask=None, packed_seq_params=context)
        h = x + 2 * x
        attended = h + layer.self_attention(layer.input_layernorm(h), None, packed_seq_params=context)[0]
        normed = layer.pre_mlp_layernorm(attended)
        torch.testing.assert_close(out, attended + layer.mlp(normed)[0] + 2 * normed)

        context.memory = None
        out, _ = layer(x, attention_mask=None, packed_seq_params=context)
        layer.engram = layer.bank = None
        assert torch.equal(out, layer(x, attention_mask=None, packed_seq_params=context)[0])


@pytest.mark.parametrize("lengths", [[[1], [1]], [[4], [4]], [[1, 3], [4]], [[2, 2], [1, 3]]])
def test_context_of_documents(lengths: list[list[int]]) -> None:
    s = sum(lengths[0])
    micro = batch(2, s, lengths)
    context = MicroContext.from_batch(micro, torch.device("cpu"))
    direct = MicroContext(document_ids=torch.from_numpy(micro.document_ids))
    flat = [n for part in lengths for n in part]
    assert context.document_starts.tolist() == [0, *np.cumsum(flat).tolist()] == direct.document_starts.tolist()
    queries, keys, *longest, first_keys = context.segments
    assert queries.dtype == keys.dtype == torch.int32
    assert queries.tolist() == keys.tolist() == context.document_starts.tolist()
    assert longest == [max(flat)] * 2 and first_keys == [0, 0]
    assert (context.qkv_format, context.max_seqlen_q, context.max_seqlen_kv) == ("sbhd", s, s)
    if len(flat) == 2:
        assert context.is_causal and context.attention_mask(torch.float32) is None
    else:
        expected = [
            [[micro.document_ids[b, i] == micro.document_ids[b, j] and j <= i for j in range(s)] for i in range(s)]
            for b in range(2)
        ]
        mask = context.attention_mask(torch.bfloat16)
        assert mask.dtype == torch.bfloat16 and mask.exp().bool().tolist() == [[rows] for rows in expected]
        assert context.attention_mask(torch.bfloat16) is mask
        assert context.attention_mask(torch.float32).exp().equal(mask.exp().float())


def test_flash_backend_is_refused_where_it_cannot_run() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"attention_backend is flash.*no CUDA device.*auto or sdpa"):
        choose_backend(small(attention_backend="flash"), cpu, torch.bfloat16)
    assert choose_backend(small(), cpu, torch.bfloat16) == "sdpa"
    assert choose_backend(small(attention_backend="sdpa"), cpu, torch.bfloat16) == "sdpa"


@pytest.mark.parametrize(
    ("version", "device", "dtype", "obstacle"),
    [
        ("2.1.0", "cuda", torch.bfloat16, ""),
        ("2.8.3+cu12", "cuda", torch.float16, ""),
        ("2.0.9", "cuda", torch.bfloat16, "flash-attn 2.0.9 is older than 2.1"),
        (None, "cuda", torch.bfloat16, "flash-attn is not installed"),
        ("2.8.3", "cuda", torch.float32, "flash-attn does not compute in float32"),
        ("2.8.3", "cpu", torch.bfloat16, "there is no CUDA device"),
    ],
)
def test_flash_is_chosen_only_where_its_causal_mask_ends_at_the_last_key(
    monkeypatch: pytest.MonkeyPatch, version: str | None, device: str, dtype: torch.dtype, obstacle: str
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert choose_backend(small(), torch.device(device), dtype) == ("sdpa" if obstacle else "flash")
    if obstacle:
        with pytest.raises(ConfigError, match=f"is flash, but {re.escape(obstacle)}"):
            choose_backend(small(attention_backend="flash"), torch.device(device), dtype)


def test_layers_share_one_attention_mask() -> None:
    """Autograd keeps it once, whatever the number of layers."""
    context = MicroContext.from_batch(batch(2, 13, [[5, 8], [1, 12]]), torch.device("cpu"))
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(13, 2, 4, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in range(3):
            sdpa(x, x, x, context, None)
    masks = {tensor.untyped_storage().data_ptr() for tensor in saved if tensor.shape[-2:] == (13, 13)}
    assert masks == {context.attention_mask(torch.float32).untyped_storage().data_ptr()}


FLASH = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


@pytest.mark.parametrize(
    "backend",
    [
        "sdpa",
        pytest.param(
            "flash", marks=[pytest.mark.gpu, pytest.mark.skipif(not FLASH, reason="needs CUDA and flash-attn")]
        ),
    ],
)
@pytest.mark.parametrize("heads,groups_of_heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("lengths", [[[13], [13]], [[5, 8], [1, 12]]], ids=["whole", "packed"])
def test_attention_backends_compute_the_same(
    backend: str, heads: int, groups_of_heads: int, lengths: list[list[int]]
) -> None:
    device, dtype = ("cuda", torch.bfloat16) if backend == "flash" else ("cpu", torch.float32)
    context = MicroContext.from_batch(batch(2, 13, lengths), torch.device(device))
    generator = torch.Generator().manual_seed(0)
    shapes = [(13, 2, n, 16) for n in (heads, groups_of_heads, groups_of_heads)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    out = {"sdpa": sdpa, "flash": flash}[backend](*inputs, context, None)

    q, k, v = exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    k, v = (x.repeat_interleave(heads // groups_of_heads, 2) for x in (k, v))
    documents = context.document_ids.cpu()
    visible = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) / 4
    expected = torch.einsum("bhij,jbhd->ibhd", scores.masked_fill(~visible, -math.inf).softmax(-1), v).flatten(2)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for x, e in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad.cpu().double(), e.grad, **tolerance)


def test_norm_keeps_small_weights_in_bf16() -> None:
    config = transformer_config(small(), Layout(), dtype=torch.bfloat16, sequence_parallel=False)
    norm = RMSNorm(config, 8, eps=1e-6)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        norm.weight.fill_(0.003)  # 1.003 is 1.0 in bf16
    out = norm(x)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + norm.weight.double())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize("name", ["tied", "softmax-shared-alltoall", "sigmoid-shared"])
def test_bf16_model_trains(groups: Groups, name: str) -> None:
    gpt = build(groups, MODELS[name], dtype=torch.bfloat16)
    micro = batch(2, 16, [[9, 7], [16]])
    loss = run(gpt, micro)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    expected = run(build(groups, MODELS[name]), micro)
    assert (loss.mean() - expected.mean()).abs() < 0.1
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p.grad).all() for p in gpt.parameters())
    assert all(buffer.dtype == torch.float32 for buffer in gpt.buffers())


def test_router_bias_moves_towards_balance(groups: Groups) -> None:
    gpt = build(groups, MODELS["sigmoid-shared"])
    router = gpt.decoder.layers[1].mlp.router
    before = router.expert_bias.clone()
    micro = batch(2, 16)
    run(gpt, micro)
    with torch.no_grad():  # evaluation does not count
        run(gpt, micro)
    counts = router.local_tokens_per_expert.clone()
    assert counts.sum() == 2 * 16 * 2
    update_router_bias(gpt)
    expected = before + 1e-3 * torch.sign(counts.mean() - counts)
    torch.testing.assert_close(router.expert_bias, expected)
    assert router.local_tokens_per_expert.sum() == 0

    run(gpt, micro)
    update_router_bias(gpt, discard=True)
    torch.testing.assert_close(router.expert_bias, expected)
    assert router.local_tokens_per_expert.sum() == 0


def test_aux_loss_is_taken_once(groups: Groups) -> None:
    model = MODELS["softmax"]
    gpt = build(groups, model)
    take_aux_loss(gpt, groups, micro_batches=1)
    micro = batch(2, 16)
    run(gpt, micro)
    run(gpt, micro)
    weights = {e.name: e.local.double() for e in canonical_entries(gpt, groups)}
    _, aux = reference(weights, model, micro)
    taken = take_aux_loss(gpt, groups, micro_batches=2)
    assert taken == pytest.approx(float(aux) / model.moe.aux_loss_coeff, rel=1e-5)
    assert taken > 1
    assert take_aux_loss(gpt, groups, micro_batches=2) == 0
    assert take_aux_loss(build(groups, MODELS["tied"]), groups, micro_batches=1) == 0


TP2, EP2, ETP2 = Layout(2, tp=2), Layout(2, ep=2), Layout(2, etp=2)
MISFITS = {
    "stages": (small(num_layers=3), Layout(2, pp=2), "num_layers=3"),
    "heads": (small(hidden_size=30, num_attention_heads=3, num_query_groups=1), TP2, "num_attention_heads=3"),
    "query-groups": (small(num_attention_heads=6, num_query_groups=3), TP2, "num_query_groups=3"),
    "projection": (
        small(num_attention_heads=8, num_query_groups=1, kv_channels=6),
        Layout(8, tp=8),
        "60 wide together",
    ),
    "vocabulary": (small(vocab_size=49, make_vocab_size_divisible_by=1), TP2, "make_vocab_size_divisible_by"),
    "ffn": (small(ffn_hidden_size=41), TP2, "model.ffn_hidden_size=41"),
    "expert-ffn": (small(moe=MoEConfig(**MOE | {"ffn_hidden_size": 21})), TP2, "moe.ffn_hidden_size=21"),
    "expert-tensor": (small(moe=MoEConfig(**MOE | {"ffn_hidden_size": 21})), ETP2, "expert_tensor_parallel_size=2"),
    "no-experts-to-split": (small(), ETP2, "expert_tensor_parallel_size=2, but .* set it to 0"),
    "experts": (small(moe=MoEConfig(**MOE | {"num_experts": 5})), EP2, "num_experts=5"),
    "no-experts": (small(), EP2, "expert_model_parallel_size to 1"),
    "sequence-parallel": (small(moe=MoEConfig(**MOE)), TP2, "needs parallel.sequence_parallel"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_models_that_do_not_fit_are_refused(name: str) -> None:
    model, layout, message = MISFITS[name]
    with pytest.raises(ConfigError, match=message):
        check_model(model, MemoryConfig(), layout, seq_length=32, sequence_parallel=False)


def test_a_model_without_vocabulary_is_not_built(groups: Groups) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 0"):
        build(groups, small(vocab_size=0))


def test_memories_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory.engram.layers names layer 2, which no pipeline stage holds"):
        memory = MemoryConfig(engram=EngramConfig(layers=[0, 2]))
        check_model(small(), memory, Layout(), seq_length=32, sequence_parallel=False)
    with pytest.raises(ConfigError, match=r"memory.bank.layers names layer -1"):
        memory = MemoryConfig(bank=BankConfig(layers=[-1], units=[2]))
        check_model(small(), memory, Layout(), seq_length=32, sequence_parallel=False)
    with pytest.raises(ConfigError, match="sequence length 33"):
        memory = MemoryConfig(bank=BankConfig(units=[2]))
        check_model(small(), memory, TP2, seq_length=33, sequence_parallel=False)
    check_model(small(), MemoryConfig(), TP2, seq_length=33, sequence_parallel=False)
