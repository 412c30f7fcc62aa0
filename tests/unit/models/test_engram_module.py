"""The Engram module against its equations, written out position by position in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megamem.memory.config import EngramConfig
from megamem.models.engram import Engram
from megamem.models.micro import MicroContext
from megamem.testing.micro import FixedMemory, packed_documents

HIDDEN, ROWS, EPS = 12, 9, 1e-6
LAYER = 3
STREAM, TABLE = f"decoder.layers.{LAYER}.engram", f"decoder.layers.{LAYER}.engram.table"


def make(dtype: torch.dtype = torch.float32, **settings) -> Engram:
    """A module whose parameters are all random, the convolution and the norms too."""
    engram = EngramConfig(**({"layers": [LAYER], "heads": 2, "width": 3} | settings))
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        layernorm_epsilon=EPS,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    module = Engram(config, engram=engram, layer=LAYER)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(module.named_parameters()):
        scale = 0.5 if "proj" in name else 0.3
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def inputs(batch: int, length: int, lookups: int, width: int = 3, boundary: float = 0.3) -> tuple[Tensor, MicroContext]:
    # A draw without scores near zero, where the slope of the square root turns fp32's last bit into a wrong gradient.
    rng = np.random.default_rng([batch, length, 8])
    hidden = torch.from_numpy(rng.standard_normal((length, batch, HIDDEN))).float().requires_grad_()
    rows = torch.from_numpy(rng.standard_normal((ROWS, width))).float().requires_grad_()
    memory = FixedMemory({TABLE: rows}, {STREAM: rng.integers(0, ROWS, (batch, length, lookups))})
    documents = torch.from_numpy(packed_documents(rng, batch, length, boundary=boundary))
    return hidden, MicroContext(document_ids=documents, memory=memory)  # type: ignore[arg-type]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + EPS) * (1 + weight)


def reference(
    p: dict[str, Tensor], hidden: Tensor, rows: Tensor, index: np.ndarray, documents: Tensor, **settings
) -> Tensor:
    """``[s, b, h]``: one token, one tap at a time."""
    taps, dilation = settings.get("conv_kernel_size", 4), max(settings.get("orders", [2, 3]))
    length, batch, _ = hidden.shape
    u: dict[tuple[int, int], Tensor] = {}
    for b in range(batch):
        for t in range(length):
            e = torch.cat([rows[i] for i in index[b, t]])
            key, value = p["key_proj.weight"] @ e, p["value_proj.weight"] @ e
            query = norm(hidden[t, b], p["norm_query.weight"])
            score = (query * norm(key, p["norm_key.weight"])).sum() / math.sqrt(HIDDEN)
            if settings.get("sqrt_gate", True):
                score = torch.sign(score) * torch.sqrt(torch.clamp(score.abs(), min=1e-6))
            u[t, b] = torch.sigmoid(score) * value
    if not taps:
        return torch.stack([torch.stack([u[t, b] for b in range(batch)]) for t in range(length)])
    output = []
    for t in range(length):
        for b in range(batch):
            total = torch.zeros(HIDDEN, dtype=torch.float64)
            for j in range(taps):
                source = t - dilation * (taps - 1 - j)
                if source >= 0 and documents[b, source] == documents[b, t]:
                    total = total + p["conv.weight"][:, j] * norm(u[source, b], p["norm_conv.weight"])
            output.append(total * torch.sigmoid(total) + u[t, b])
    return torch.stack(output).view(length, batch, HIDDEN)


SETTINGS = [
    {},
    {"conv_kernel_size": 0},
    {"conv_kernel_size": 1},
    {"sqrt_gate": False},
    {"orders": [2], "conv_kernel_size": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (1, 5), (2, 17)])
def test_forward_and_every_gradient(batch: int, length: int, settings: dict) -> None:
    module = make(**settings)
    hidden, context = inputs(batch, length, 2 * len(settings.get("orders", [2, 3])), boundary=0.15)
    rows, index = context.memory.rows(TABLE), context.memory.host_index(STREAM)
    upstream = torch.from_numpy(np.random.default_rng(5).standard_normal(hidden.shape))

    output = module(hidden, context)
    (output * upstream.float()).sum().backward()

    doubles = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    hidden64, rows64 = (x.detach().double().requires_grad_() for x in (hidden, rows))
    expected = reference(doubles, hidden64, rows64, index, context.document_ids, **settings)
    (expected * upstream).sum().backward()

    close = {"atol": 2e-5, "rtol": 2e-4}
    torch.testing.assert_close(output.double(), expected, **close)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, **close)
    torch.testing.assert_close(rows.grad.double(), rows64.grad, **close)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.grad.double(), doubles[name].grad, **close, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_parameters_are_named_and_shaped_as_checkpoints_expect() -> None:
    shapes = {name: tuple(p.shape) for name, p in make().named_parameters()}
    assert shapes == {
        "key_proj.weight": (HIDDEN, 12),
        "value_proj.weight": (HIDDEN, 12),
        "norm_key.weight": (HIDDEN,),
        "norm_query.weight": (HIDDEN,),
        "norm_conv.weight": (HIDDEN,),
        "conv.weight": (HIDDEN, 4),
    }
    assert not [name for name, _ in make(conv_kernel_size=0).named_parameters() if "conv" in name]
    assert make().conv.weight.init_std == 0.0


def test_zero_table_adds_nothing() -> None:
    module = make()
    hidden, context = inputs(2, 17, 4)
    context.memory.rows(TABLE).data.zero_()
    assert not module(hidden, context).any()


def test_zero_convolution_passes_the_gated_value() -> None:
    module, plain = make(), make(conv_kernel_size=0)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "conv" not in k})
    hidden, context = inputs(2, 17, 4)
    assert (module(hidden, context) != plain(hidden, context)).any()
    module.conv.weight.data.zero_()
    torch.testing.assert_close(module(hidden, context), plain(hidden, context), rtol=0, atol=0)


def test_a_document_does_not_see_its_neighbours() -> None:
    module = make()
    hidden, context = inputs(1, 12, 4)
    context.document_ids.copy_(torch.tensor([[0] * 5 + [1] * 7]))
    before = module(hidden, context)
    hidden.data[:5] += 1.0
    after = module(hidden, context)
    assert (before[:5] != after[:5]).any()
    torch.testing.assert_close(before[5:], after[5:], rtol=0, atol=0)


def test_positions_see_only_the_past() -> None:
    module = make()
    hidden, context = inputs(1, 12, 4, boundary=0.0)
    before = module(hidden, context)
    # Other rows, not another hidden state: that would scale the gated value, which the norm undoes.
    index = context.memory.host_index(STREAM)
    index[0, 7] = (index[0, 7] + 1) % ROWS
    changed = (module(hidden, context) != before).flatten(1).any(1)
    assert changed.tolist() == [t in (7, 10) for t in range(12)]  # itself, and one tap of dilation 3 later


def test_gate_observer_sees_the_gates() -> None:
    module = make()
    hidden, context = inputs(2, 5, 4)
    seen: list[Tensor] = []
    module.gate_observer = seen.append
    module(hidden, context)
    (gates,) = seen
    assert gates.shape == (5, 2, 1)
    assert gates.dtype == torch.float32
    assert not gates.requires_grad
    assert ((gates > 0) & (gates < 1)).all()


def test_bf16_is_near_fp32_and_row_gradients_stay_fp32() -> None:
    exact, module = make(), make(torch.bfloat16)
    hidden, context = inputs(2, 17, 4)
    expected = exact(hidden, context)
    output = module(hidden.detach().bfloat16(), context)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.06, rtol=0.05)
    output.float().sum().backward()
    assert context.memory.rows(TABLE).grad.dtype == torch.float32
