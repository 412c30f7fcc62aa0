"""Memory modules under tensor and context parallelism equal one process: outputs, and gradients of inputs, parameters and
rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.memory.config import BankConfig, EngramConfig
from megamem.models.bank import Bank
from megamem.models.engram import Engram
from megamem.models.micro import MicroContext
from megamem.parallel import groups
from megamem.parallel.layout import Layout
from megamem.testing.distributed import run_distributed
from megamem.testing.micro import FixedMemory, packed_documents

HIDDEN, ROWS, BATCH = 8, 7, 2
ENGRAM = EngramConfig(layers=[0], heads=2, width=3)  # dilation 3, 4 taps: reaches 9 positions back
BANK = BankConfig(units=[3, 2])
TABLES = {"decoder.layers.0.engram.table": 3} | {
    f"decoder.layers.0.bank.level{level}.table": 3 * units * HIDDEN for level, units in enumerate(BANK.units, start=1)
}
Result = dict[str, np.ndarray]


def run_modules(length: int, layout: Layout, *, rank: int = 0, sequence_parallel: bool = False) -> dict[str, Result]:
    """Forward and backward of both modules on this rank's part of one micro-batch; results by kind and name."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=sequence_parallel,
    )
    rng = np.random.default_rng(length)
    documents = packed_documents(rng, BATCH, length, boundary=0.1)
    hidden, upstream = (torch.from_numpy(rng.standard_normal((length, BATCH, HIDDEN))).float() for _ in range(2))
    tables = {
        name: torch.from_numpy(rng.standard_normal((ROWS, width))).float().requires_grad_()
        for name, width in TABLES.items()
    }
    blocks = rng.integers(0, ROWS, (2, documents.max() + 1))
    indices = {"decoder.layers.0.engram": rng.integers(0, ROWS, (BATCH, length, 4))}
    indices |= {f"bank.level{level + 1}": blocks[level][documents][..., None] for level in range(2)}

    place = layout.coordinates(rank)
    own = slice(place.slice * length // layout.slices, (place.slice + 1) * length // layout.slices)
    memory = FixedMemory(tables, {name: np.ascontiguousarray(index[:, own]) for name, index in indices.items()})
    context = MicroContext(
        document_ids=torch.from_numpy(documents),
        memory=memory,  # type: ignore[arg-type]
        part=place.cp,
        parts=layout.cp,
    )
    held = own if sequence_parallel else context.positions
    hidden, upstream = hidden[held].clone(), upstream[held]
    hidden.requires_grad_()

    engram, bank = Engram(config, engram=ENGRAM, layer=0), Bank(config, bank=BANK, layer=0)
    for _, parameter in sorted(engram.named_parameters()):
        parameter.data.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)) * 0.5)
        assert parameter.grad_partial_over_tp == (layout.tp > 1)
        assert not parameter.sequence_parallel
    output = engram(hidden, context) + bank(hidden, context)
    (output * upstream).sum().backward()
    return {
        "activations": {"output": output.detach().numpy(), "input gradient": hidden.grad.numpy()},
        "partial": {n: t.grad.numpy() for n, t in [*engram.named_parameters(), *tables.items()]},
    }


def run_cases(layout: Layout, cases: list[tuple[int, bool]]) -> list[Any]:
    rank = groups.initialize(layout, seed=0).coordinates.rank
    return [run_modules(length, layout, rank=rank, sequence_parallel=sp) for length, sp in cases]


@pytest.mark.parametrize(
    ("tp", "cp", "lengths"),
    [
        # Slices shorter than the reach of the convolution, as long, and longer.
        (2, 1, [2, 6, 18, 26]),
        (4, 1, [8, 48]),
        (1, 2, [2, 6, 18, 26]),
        (2, 2, [8, 48]),
    ],
    ids=["tp2", "tp4", "cp2", "tp2-cp2"],
)
def test_equals_one_process(tp: int, cp: int, lengths: list[int]) -> None:
    layout = Layout(world_size=tp * cp, tp=tp, cp=cp)
    cases = [(length, sp) for length in lengths for sp in ((False, True) if tp > 1 else (False,))]
    ranks = run_distributed(run_cases, layout.world_size, layout, cases)
    for (length, sequence_parallel), *results in zip(cases, *ranks, strict=True):
        expected = run_modules(length, Layout())
        for name, whole in expected["activations"].items():
            parts = [result["activations"][name] for result in results]
            copies = 1 if sequence_parallel else tp  # tensor-parallel ranks hold the same part
            for copy in range(copies):
                together = np.concatenate(parts[copy::copies])
                np.testing.assert_allclose(together, whole, atol=2e-6, rtol=2e-6, err_msg=f"{name}, length {length}")
        for name, whole in expected["partial"].items():
            total = sum(result["partial"][name] for result in results)
            scale = float(np.abs(whole).max())
            np.testing.assert_allclose(total, whole, atol=2e-6 * max(1.0, scale), err_msg=f"{name}, length {length}")
