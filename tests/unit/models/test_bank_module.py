"""The bank module: the sum over levels, its equality with a wider feed-forward layer, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megamem.memory.config import BankConfig
from megamem.models.bank import Bank
from megamem.models.micro import MicroContext
from megamem.testing.micro import FixedMemory, packed_documents

HIDDEN, LAYER = 8, 1


def make(units: list[int], dtype: torch.dtype = torch.float32) -> Bank:
    config = TransformerConfig(num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, params_dtype=dtype)
    return Bank(config, bank=BankConfig(units=units), layer=LAYER)


def inputs(units: list[int], batch: int, length: int, blocks: int = 4) -> tuple[Tensor, MicroContext]:
    """Each document reads one block per level; a working set holds blocks that this micro-batch does not read."""
    rng = np.random.default_rng([batch, length, len(units)])
    x = torch.from_numpy(rng.standard_normal((length, batch, HIDDEN))).float().requires_grad_()
    documents = packed_documents(rng, batch, length)
    tables, indices = {}, {}
    for level, width in enumerate(units, start=1):
        if width:
            rows = torch.from_numpy(rng.standard_normal((blocks + 1, 3 * width * HIDDEN))).float().requires_grad_()
            tables[f"decoder.layers.{LAYER}.bank.level{level}.table"] = rows
            block = rng.integers(0, blocks, documents.max() + 1)
            indices[f"bank.level{level}"] = block[documents][..., None]
    memory = FixedMemory(tables, indices)
    return x, MicroContext(document_ids=torch.from_numpy(documents), memory=memory)  # type: ignore[arg-type]


def reference(memory: FixedMemory, tables: dict[str, Tensor], x: Tensor, units: list[int]) -> Tensor:
    """Each token through one SwiGLU whose hidden units are those of all its blocks together."""
    output = []
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            first, second, third = [], [], []
            for level, width in enumerate(units, start=1):
                if width:
                    rows = tables[f"decoder.layers.{LAYER}.bank.level{level}.table"]
                    block = rows[memory.indices[f"bank.level{level}"][b, t, 0]].view(3, width, HIDDEN)
                    for part, matrix in zip((first, second, third), block, strict=True):
                        part.append(matrix)
            hidden = F.silu(torch.cat(first) @ x[t, b]) * (torch.cat(second) @ x[t, b])
            output.append(hidden @ torch.cat(third))
    return torch.stack(output).view_as(x)


@pytest.mark.parametrize("units", [[5], [3, 2], [4, 0, 1], [0, 3]], ids=str)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (1, 5), (2, 17)])
def test_equals_a_wider_feed_forward_layer(batch: int, length: int, units: list[int]) -> None:
    x, context = inputs(units, batch, length)
    memory = context.memory
    upstream = torch.from_numpy(np.random.default_rng(5).standard_normal(x.shape))

    output = make(units)(x, context)
    (output * upstream.float()).sum().backward()

    tables = {name: rows.detach().double().requires_grad_() for name, rows in memory.tables.items()}
    x64 = x.detach().double().requires_grad_()
    expected = reference(memory, tables, x64, units)
    (expected * upstream).sum().backward()

    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(output.double(), expected, **close)
    torch.testing.assert_close(x.grad.double(), x64.grad, **close)
    for name, rows in memory.tables.items():
        torch.testing.assert_close(rows.grad.double(), tables[name].grad, **close)
        assert not rows.grad[-1].any()  # a block that no token here reads


def test_zero_output_matrix_adds_nothing_but_learns() -> None:
    x, context = inputs([3], 2, 9)
    rows = next(iter(context.memory.tables.values()))
    rows.data[:, 2 * 3 * HIDDEN :] = 0
    output = make([3])(x, context)
    assert not output.any()
    output.sum().backward()
    assert not x.grad.any()
    assert not rows.grad[:, : 2 * 3 * HIDDEN].any()
    assert rows.grad[:, 2 * 3 * HIDDEN :].any()


def test_has_no_parameters() -> None:
    assert not list(make([3]).parameters())


def test_bf16_is_near_fp32_and_row_gradients_stay_fp32() -> None:
    x, context = inputs([3, 2], 2, 17)
    expected = make([3, 2])(x, context)
    output = make([3, 2], torch.bfloat16)(x.detach().bfloat16(), context)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.02 * expected.abs().max().item(), rtol=0.05)
    output.float().sum().backward()
    assert all(rows.grad.dtype == torch.float32 for rows in context.memory.tables.values())
