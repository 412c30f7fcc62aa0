"""Loss, gradients and initial weights of the backbone under every kind of parallelism against one process, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import tee

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from megamem.batch import MicroBatch
from megamem.memory.config import MemoryConfig
from megamem.models.canonical import canonical_entries, gather
from megamem.models.chunks import model_chunks
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.gpt import build_model
from megamem.models.micro import MicroContext
from megamem.models.router import take_aux_loss, update_router_bias
from megamem.parallel.groups import Groups, destroy, initialize
from megamem.parallel.layout import Layout
from megamem.testing.distributed import run_distributed
from megamem.train.config import Recompute

SEQUENCE = 12

SHAPE: dict = {
    "num_layers": 4,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 50,
    "make_vocab_size_divisible_by": 8,
    "init_method_std": 0.2,
}
MOE: dict = {"layers": [1, 3], "num_experts": 4, "ffn_hidden_size": 20, "aux_loss_coeff": 0.3}
MODELS = {
    "tied": ModelConfig(**SHAPE),
    "untied": ModelConfig(**SHAPE, untie_embeddings_and_output_weights=True),
    "one-key-head": ModelConfig(**SHAPE | {"num_query_groups": 1}),
    "softmax": ModelConfig(**SHAPE, moe=MoEConfig(**MOE, shared_expert_hidden_size=12)),
    "softmax-alltoall": ModelConfig(
        **SHAPE, moe=MoEConfig(**MOE, shared_expert_hidden_size=12, token_dispatcher="alltoall")
    ),
    "six-layers": ModelConfig(**SHAPE | {"num_layers": 6}),
    "sigmoid": ModelConfig(**SHAPE, moe=MoEConfig(**MOE, router="sigmoid_bias")),
    "sigmoid-alltoall": ModelConfig(**SHAPE, moe=MoEConfig(**MOE, router="sigmoid_bias", token_dispatcher="alltoall")),
}


def micro_batch(index: int) -> MicroBatch:
    """Micro-batch ``index`` of the global batch: two packed sequences, some tokens not counted."""
    rng = np.random.default_rng(index)
    tokens = rng.integers(0, 50, (2, SEQUENCE + 1))
    cut = 1 + index % (SEQUENCE - 1)
    documents = np.zeros((2, SEQUENCE), np.int32)
    documents[0, cut:], documents[1] = 1, 2
    return MicroBatch(
        sample_ids=np.arange(2) + 2 * index,
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=(rng.random((2, SEQUENCE)) < 0.8).astype(np.float32),
        document_ids=documents,
        document_paths=np.zeros((3, 0), np.int64),
    )


def one_step(layout: Layout, model: ModelConfig, sequence_parallel: bool, recompute: Recompute = "none") -> dict:
    """Forward and backward of one optimizer step on this rank; whole tensors by canonical name."""
    groups = initialize(layout, seed=0)
    gpt = nn.ModuleList(
        build_model(
            model,
            MemoryConfig(),
            groups=groups,
            seq_length=SEQUENCE,
            dtype=torch.float32,
            seed=11,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            chunk=chunk,
        )
        for chunk in range(layout.vpp)
    )
    weights = {e.name: gather(e, e.local, groups).numpy().copy() for e in canonical_entries(gpt, groups)}

    count = model.num_layers  # interleaving wants a multiple of the stages
    own = [micro_batch(i) for i in range(groups.coordinates.dp, count, layout.dp)]
    counted = sum(float(micro_batch(i).loss_mask.sum()) for i in range(count))

    def forward(iterator: Iterator[MicroBatch], gpt: GPTModel) -> tuple[torch.Tensor, Callable]:
        micro = next(iterator)
        context = MicroContext.from_batch(micro, groups.device, part=groups.coordinates.cp, parts=layout.cp)
        part = context.positions
        loss = gpt(
            torch.from_numpy(micro.tokens[:, part]),
            torch.arange(part.start, part.stop).expand(2, -1),
            None,
            labels=torch.from_numpy(micro.labels[:, part]),
            packed_seq_params=context,
        )

        def scaled(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = (loss * torch.from_numpy(micro.loss_mask[:, part])).sum()
            return total * (layout.dp * len(own) / counted), total.detach()

        return loss, scaled

    totals = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=list(tee(own, layout.vpp)),
        model=model_chunks(gpt),
        num_microbatches=len(own),
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
    loss = torch.stack(totals).sum().view(1) if totals else torch.zeros(1)
    dist.all_reduce(loss)
    aux = take_aux_loss(gpt, groups, micro_batches=len(own))
    update_router_bias(gpt)
    entries = canonical_entries(gpt, groups)
    _reduce(gpt, groups)
    gradients = {e.name: gather(e, e.tensor.grad[e.rows], groups).numpy() for e in entries if e.tensor.requires_grad}
    biases = {e.name: e.local.numpy() for e in entries if not e.tensor.requires_grad}
    destroy()
    return {
        "loss": loss.item() / counted / layout.tp,
        "aux": aux,
        "weights": weights,
        "gradients": gradients,
        "biases": biases,
        "copies": [e.name for e in entries if e.is_copy],
    }


def _reduce(gpt: nn.ModuleList, groups: Groups) -> None:
    """What the trainer does to gradients, spelled out."""
    for parameter in gpt.parameters():
        if getattr(parameter, "sequence_parallel", False) or getattr(parameter, "grad_partial_over_tp", False):
            dist.all_reduce(parameter.grad, group=groups.tp)
        expert = not getattr(parameter, "allreduce", True)
        dist.all_reduce(parameter.grad, group=groups.expert_dp if expert else groups.dp_cp)
        parameter.grad /= groups.layout.dp * groups.layout.cp
    if groups.layout.pp > 1:
        for parameter in gpt.parameters():
            if getattr(parameter, "shared_embedding", False):
                dist.all_reduce(parameter.grad, group=groups.embedding)


@cache
def one_process(name: str) -> dict:
    return run_distributed(one_step, 1, Layout(), MODELS[name], False)[0]


CASES = [
    ("tied", Layout(2, tp=2), False),
    ("untied", Layout(2, tp=2), True),
    ("one-key-head", Layout(2, tp=2), True),
    ("softmax", Layout(2, tp=2), True),
    ("sigmoid-alltoall", Layout(2, tp=2), True),
    ("tied", Layout(2, pp=2), False),
    ("untied", Layout(4, pp=4), False),
    ("sigmoid", Layout(2, pp=2), False),
    ("tied", Layout(2), False),
    ("softmax", Layout(2, ep=2), False),
    ("softmax-alltoall", Layout(2, ep=2), False),
    ("sigmoid", Layout(4, ep=2), False),
    ("softmax", Layout(4, tp=2, ep=2), True),
    ("softmax-alltoall", Layout(4, tp=2, ep=2), True),
    ("softmax", Layout(4, pp=2, ep=2), False),
    ("tied", Layout(2, pp=2, vpp=2), False),
    ("softmax", Layout(4, tp=2, pp=2, vpp=2), True),
    ("six-layers", Layout(3, pp=3, vpp=2), False),
    ("softmax", Layout(2, cp=2), False),
    ("sigmoid-alltoall", Layout(4, cp=2, ep=2), False),
    ("sigmoid", Layout(3, pp=3, last_stage_layers=2), False),
    ("tied", Layout(2, pp=2, first_stage_layers=1), False),
    ("untied", Layout(2, pp=2, first_stage_layers=1, last_stage_layers=3), False),
    ("softmax", Layout(2, tp=2, etp=1), True),
    ("softmax", Layout(2, tp=2, ep=2, etp=1), True),
    ("softmax-alltoall", Layout(2, tp=2, ep=2, etp=1), True),
    ("sigmoid", Layout(2, etp=2), False),
    ("sigmoid-alltoall", Layout(4, etp=2, ep=2), False),
    ("softmax-alltoall", Layout(4, tp=2, ep=4, etp=1), True),
]


def _label(layout: Layout) -> str:
    uneven = layout.first_stage_layers or layout.last_stage_layers
    ends = f"-{layout.first_stage_layers}..{layout.last_stage_layers}" if uneven else ""
    sizes = {
        "tp": layout.tp,
        "cp": layout.cp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "dp": layout.dp,
        "ep": layout.ep,
        "etp": layout.etp,
    }
    return "-".join(f"{name}{size}" for name, size in sizes.items()) + ends


@pytest.mark.parametrize(
    "name,layout,sequence_parallel",
    CASES,
    ids=[f"{n}-{_label(x)}{'-sp' if sp else ''}" for n, x, sp in CASES],
)
def test_layouts_agree_with_one_process(name: str, layout: Layout, sequence_parallel: bool) -> None:
    expected = one_process(name)
    ranks = run_distributed(one_step, layout.world_size, layout, MODELS[name], sequence_parallel)
    for kind in ("weights", "gradients", "biases"):
        found = set().union(*(rank[kind] for rank in ranks))
        assert found == set(expected[kind])
    tied_copy = ["embedding.word_embeddings.weight"] if name != "untied" and layout.pp > 1 else []
    assert [rank["copies"] for rank in ranks[-layout.stage_size :]] == [tied_copy] * layout.stage_size
    assert not any(rank["copies"] for rank in ranks[: -layout.stage_size])
    for rank in ranks:
        assert rank["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert rank["aux"] == pytest.approx(expected["aux"], rel=1e-5)
        for tensor, value in rank["weights"].items():
            assert np.array_equal(value, expected["weights"][tensor]), f"initial {tensor} depends on the layout"
        for tensor, value in rank["gradients"].items():
            np.testing.assert_allclose(value, expected["gradients"][tensor], atol=1e-5, rtol=1e-4, err_msg=tensor)
        for tensor, value in rank["biases"].items():
            np.testing.assert_array_equal(value, expected["biases"][tensor], err_msg=tensor)


@pytest.mark.parametrize(
    "name,layout,sequence_parallel",
    [
        ("softmax", Layout(), False),
        ("sigmoid", Layout(2, ep=2), False),
        ("softmax-alltoall", Layout(4, tp=2, pp=2, vpp=2), True),
    ],
    ids=["one-process", "ep2", "tp2-pp2-vpp2-sp"],
)
def test_recompute_changes_no_bit(name: str, layout: Layout, sequence_parallel: bool) -> None:
    kept = run_distributed(one_step, layout.world_size, layout, MODELS[name], sequence_parallel)
    for recompute in ("selective", "full"):
        again = run_distributed(one_step, layout.world_size, layout, MODELS[name], sequence_parallel, recompute)
        for mine, theirs in zip(again, kept, strict=True):
            assert (mine["loss"], mine["aux"]) == (theirs["loss"], theirs["aux"])
            for kind in ("gradients", "biases"):
                assert mine[kind].keys() == theirs[kind].keys()
                for tensor, value in mine[kind].items():
                    assert np.array_equal(value, theirs[kind][tensor]), f"{recompute}: {tensor}"


def test_one_process_has_gradients_everywhere() -> None:
    """The comparison above would also pass on zeros."""
    result = one_process("softmax")
    assert result["aux"] > 1
    assert all(np.abs(gradient).max() > 1e-5 for gradient in result["gradients"].values())
    assert all(np.abs(bias).max() > 0 for bias in one_process("sigmoid")["biases"].values())
