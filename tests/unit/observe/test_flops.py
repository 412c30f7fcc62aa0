"""The FLOP formulas against torch's own counter on a model that is really run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.gpt import build_model
from megamem.models.micro import MicroContext
from megamem.observe.flops import core_flops, forward_flops, layer_flops, recompute_flops, training_flops
from megamem.parallel.groups import Groups, destroy, init_distributed, initialize
from megamem.parallel.layout import Layout
from megamem.testing.micro import FixedMemory
from megamem.train.config import Recompute

B, S, H = 2, 16, 24
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=H,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
    make_vocab_size_divisible_by=8,
    moe=MoEConfig(layers=[1], num_experts=6, router_topk=2, ffn_hidden_size=20, shared_expert_hidden_size=12),
)
MEMORY = MemoryConfig(
    engram=EngramConfig(layers=[0], heads=2, width=4, rows_per_head=50),
    bank=BankConfig(layers=[2], units=[3], branching=2),
)
NO_MEMORY = MemoryConfig()
aten = torch.ops.aten


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    init_distributed()
    yield initialize(Layout(), seed=3)
    destroy()
    dist.destroy_process_group()


def run(groups: Groups, memory: MemoryConfig, recompute: Recompute = "none") -> tuple[int, int]:
    """Operations per token that torch counts in forward and in backward, of one sequence after the other."""
    gpt = build_model(
        MODEL,
        memory,
        groups=groups,
        seq_length=S,
        dtype=torch.float32,
        seed=5,
        sequence_parallel=False,
        recompute=recompute,
    )
    rng = np.random.default_rng(0)
    columns = 2 * 2 * 4
    tables = {
        "decoder.layers.0.engram.table": torch.randn(50, 4, requires_grad=True),
        "decoder.layers.2.bank.level1.table": torch.randn(2, 3 * 3 * H, requires_grad=True),
    }
    indices = {
        "decoder.layers.0.engram": rng.integers(0, 50, (B, S, columns // 4)),
        "bank.level1": np.broadcast_to(np.arange(B)[:, None, None], (B, S, 1)).astype(np.int64),
    }
    documents = np.broadcast_to(np.arange(B, dtype=np.int32)[:, None], (B, S)).copy()
    context = MicroContext(
        document_ids=torch.from_numpy(documents),
        memory=FixedMemory(tables, indices) if memory is not NO_MEMORY else None,  # type: ignore[arg-type]
    )
    tokens = torch.from_numpy(rng.integers(0, 50, (B, S)))
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, out_shape=None, **more: (
            sdpa_flop_count(q, k, v)
        ),
        # Scores again, and four products of their size: as many as flash attention's backward.
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *rest, out_shape=None, **more: 2 * sdpa_flop_count(q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as forward:
        loss = gpt(tokens, torch.arange(S).expand(B, S), None, labels=tokens, packed_seq_params=context)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        loss.sum().backward()
    return forward.get_total_flops() // (B * S), backward.get_total_flops() // (B * S)


@pytest.mark.parametrize("memory", [MEMORY, NO_MEMORY], ids=["memories", "backbone"])
def test_forward_is_what_torch_counts(groups: Groups, memory: MemoryConfig) -> None:
    expected = sum(forward_flops(MODEL, memory, S, causal=False).values())
    if memory.engram.layers:
        # The gate's inner product and the convolution are kernels of megamem's own, which torch does not count.
        expected -= 2 * H + 2 * memory.engram.conv_kernel_size * H
    assert run(groups, memory)[0] == expected


def test_backward_is_twice_forward(groups: Groups) -> None:
    forward, backward = run(groups, NO_MEMORY)
    assert backward == 2 * forward


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_is_what_backward_does_more(groups: Groups, recompute: Recompute) -> None:
    more = run(groups, NO_MEMORY, recompute)[1] - run(groups, NO_MEMORY)[1]
    masked = (core_flops(MODEL, S, causal=False) - core_flops(MODEL, S)) * MODEL.num_layers
    assert more == recompute_flops(MODEL, NO_MEMORY, S, recompute) + masked


def test_numbers_of_a_known_layer() -> None:
    llama = ModelConfig(
        num_layers=2, hidden_size=4, ffn_hidden_size=6, num_attention_heads=2, num_query_groups=1, vocab_size=128
    )
    # Projections 2 * 4 * (4 + 2 * 2) + 2 * 4 * 4 = 96; scores and values of (3 + 1) / 2 keys: 4 * 4 * 2 = 32.
    assert layer_flops(llama, NO_MEMORY, 3, 0) == {"attention": 128, "mlp": 144}
    assert forward_flops(llama, NO_MEMORY, 3) == {"attention": 256, "mlp": 288, "logits": 1024}
    assert training_flops(llama, NO_MEMORY, 3) == 3 * (256 + 288 + 1024)
    assert forward_flops(llama, NO_MEMORY, 3, layers=[1], logits=False) == {"attention": 128, "mlp": 144}


def test_parts_of_memories() -> None:
    parts = forward_flops(MODEL, MEMORY, S)
    assert parts["engram"] == 4 * 16 * H + 2 * H + 2 * 4 * H
    assert parts["bank"] == 6 * H * 3
    assert parts["moe"] == 2 * H * 6 + 6 * H * (2 * 20 + 12)
    assert recompute_flops(MODEL, MEMORY, S, "none") == 0
    kept = recompute_flops(MODEL, MEMORY, S, "selective")
    assert kept == 3 * core_flops(MODEL, S) + parts["engram"] + parts["bank"]
