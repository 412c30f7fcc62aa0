"""Activation recompute: the same bits with fewer of them kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.gpt import build_model
from megamem.models.micro import MicroContext
from megamem.models.router import take_aux_loss
from megamem.parallel.groups import Groups, destroy, init_distributed, initialize
from megamem.parallel.layout import Layout
from megamem.testing.micro import FixedMemory, packed_documents
from megamem.train.config import Recompute

BATCH, LENGTH, ROWS, HIDDEN = 2, 21, 11, 24
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=HIDDEN,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
    make_vocab_size_divisible_by=8,
    init_method_std=0.2,
    moe=MoEConfig(layers=[1], num_experts=4, ffn_hidden_size=20, aux_loss_coeff=0.3),
)
MEMORY = MemoryConfig(
    engram=EngramConfig(layers=[0, 2], heads=2, width=4), bank=BankConfig(layers=[0, 1], units=[3], branching=4)
)


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    init_distributed()
    yield initialize(Layout(), seed=3)
    destroy()
    dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Step:
    losses: Tensor
    gradients: dict[str, Tensor]
    rows: dict[str, Tensor]
    aux: float
    kept: int
    """Bytes that autograd held between forward and backward, without parameters and rows."""


def step(groups: Groups, recompute: Recompute, *, memories: bool = True, dtype: torch.dtype = torch.float32) -> Step:
    """Two micro-batches, whose gradients accumulate."""
    gpt = build_model(
        MODEL,
        MEMORY,
        groups=groups,
        seq_length=LENGTH,
        dtype=dtype,
        seed=5,
        sequence_parallel=False,
        recompute=recompute,
    )
    rng = np.random.default_rng(7)
    for name, parameter in gpt.named_parameters():
        if name.endswith("conv.weight"):  # which starts at zero, and so do gradients through it
            parameter.data.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)))
    widths = {f"decoder.layers.{layer}.engram": 4 for layer in (0, 2)}
    widths |= {f"decoder.layers.{layer}.bank.level1": 3 * 3 * HIDDEN for layer in (0, 1)}
    rows = {
        f"{name}.table": torch.from_numpy(rng.standard_normal((ROWS, width))).float().mul_(0.3).requires_grad_()
        for name, width in widths.items()
    }
    ignored = {tensor.untyped_storage().data_ptr() for tensor in (*gpt.parameters(), *gpt.buffers(), *rows.values())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    losses = []
    for _ in range(2):
        documents = packed_documents(rng, BATCH, LENGTH)
        indices = {f"decoder.layers.{layer}.engram": rng.integers(0, ROWS, (BATCH, LENGTH, 4)) for layer in (0, 2)}
        indices["bank.level1"] = (documents % ROWS)[..., None].astype(np.int64)
        context = MicroContext(
            document_ids=torch.from_numpy(documents),
            memory=FixedMemory(rows, indices) if memories else None,  # type: ignore[arg-type]
        )
        tokens = torch.from_numpy(rng.integers(0, 50, (BATCH, LENGTH + 1)))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = gpt(
                tokens[:, :-1],
                torch.arange(LENGTH).expand(BATCH, LENGTH),
                None,
                labels=tokens[:, 1:],
                packed_seq_params=context,
            )
        held = sum(kept.values())
        loss.sum().backward()
        losses.append(loss.detach())
    return Step(
        torch.stack(losses),
        {name: parameter.grad for name, parameter in gpt.named_parameters() if parameter.grad is not None},
        {name: table.grad for name, table in rows.items() if table.grad is not None},
        take_aux_loss(gpt, groups, micro_batches=2),
        held,
    )


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("memories", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
def test_every_gradient_has_the_same_bits(
    groups: Groups, recompute: Recompute, memories: bool, dtype: torch.dtype
) -> None:
    kept, again = (step(groups, how, memories=memories, dtype=dtype) for how in ("none", recompute))
    assert torch.equal(again.losses, kept.losses)
    assert again.aux == kept.aux > 0
    assert len(kept.rows) == (4 if memories else 0)
    for found, expected in ((again.gradients, kept.gradients), (again.rows, kept.rows)):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            assert torch.equal(found[name], gradient), name


def test_less_is_kept(groups: Groups) -> None:
    none, selective, full = (step(groups, recompute).kept for recompute in ("none", "selective", "full"))
    assert full < 0.5 * selective
    assert selective < 0.9 * none
    assert step(groups, "none", memories=False).kept < none
