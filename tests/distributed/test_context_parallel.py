"""Context parallelism: attention over ranks that share sequences, the positions that they see, and what a run reports equal
one process. Whole runs of many layouts are compared in ``test_layout_parity.py``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.models.attention import CoreAttention
from megamem.models.micro import MicroContext
from megamem.models.rotary import PartRotaryEmbedding
from megamem.parallel import groups as parallel_groups
from megamem.parallel.layout import Layout
from megamem.testing.distributed import run_distributed
from megamem.testing.micro import packed_documents
from megamem_launch.config import load_config

LENGTH, BATCH, WIDTH = 12, 2, 4
HEADS = [(4, 4), (6, 2), (3, 1)]


def documents(kind: str) -> np.ndarray:
    """``[b, s]`` ids: random, one for each sequence, or with boundaries exactly at the cuts of 2 and of 4 parts."""
    if kind == "random":
        return packed_documents(np.random.default_rng(5), BATCH, LENGTH, boundary=0.25)
    lengths = {"whole": [12, 12], "at cuts": [6, 6, 3, 6, 3]}[kind]
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths).reshape(BATCH, LENGTH)


CASES = [(kind, heads) for kind in ("random", "whole", "at cuts") for heads in HEADS]


def attend(kind: str, heads: tuple[int, int], part: int, parts: int, cp_group: Any) -> list[np.ndarray]:
    """Output ``[s / parts, b, h * d]`` and the gradients of queries, keys and values for this part."""
    config = TransformerConfig(num_layers=1, hidden_size=heads[0] * WIDTH, num_attention_heads=heads[0])
    pg_collection = ProcessGroupCollection(cp=cp_group)
    attention = CoreAttention(config, backend="sdpa", layer_number=1, pg_collection=pg_collection)
    context = MicroContext(document_ids=torch.from_numpy(documents(kind)), part=part, parts=parts)
    generator = torch.Generator().manual_seed(3)
    shapes = [(LENGTH, BATCH, n, WIDTH) for n in (heads[0], heads[1], heads[1])]
    whole = [torch.randn(shape, generator=generator) for shape in shapes]
    upstream = torch.randn(LENGTH, BATCH, heads[0] * WIDTH, generator=generator)[context.positions]
    inputs = [x[context.positions].clone().requires_grad_() for x in whole]
    output = attention(*inputs, None, packed_seq_params=context)
    (output * upstream).sum().backward()
    return [output.detach().numpy(), *(x.grad.numpy() for x in inputs)]


def run_parts(parts: int) -> dict[str, Any]:
    groups = parallel_groups.initialize(Layout(world_size=parts, cp=parts), seed=0)
    whole = RotaryEmbedding(kv_channels=WIDTH, rotary_percent=1.0, use_cpu_initialization=True)
    rotary = PartRotaryEmbedding(whole, groups.cp)
    context = MicroContext(document_ids=torch.zeros(1, LENGTH, dtype=torch.int32), part=1, parts=parts)
    length = rotary.get_rotary_seq_len(None, None, None, SimpleNamespace(), context)
    # As megatron's GPTModel calls it.
    angles = rotary(length, packed_seq=context.qkv_format == "thd", cp_group=context.cp_group)
    return {
        "attention": [attend(*case, groups.coordinates.cp, parts, groups.cp) for case in CASES],
        "angles": angles.numpy(),
    }


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_over_ranks_equal_one_process(parts: int) -> None:
    results = run_distributed(run_parts, parts, parts)
    for i, case in enumerate(CASES):
        expected = attend(*case, 0, 1, None)
        for name, whole, *pieces in zip(
            ("output", "query", "key", "value"), expected, *(r["attention"][i] for r in results), strict=True
        ):
            np.testing.assert_allclose(np.concatenate(pieces), whole, atol=2e-6, err_msg=f"{name} of {case}")
    angles = np.concatenate([r["angles"] for r in results])
    frequencies = 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    expected_angles = np.tile(np.outer(np.arange(LENGTH), frequencies), 2)
    np.testing.assert_allclose(angles[:, 0, 0], expected_angles, rtol=1e-6)


OVERRIDES = [
    "base=tiny",
    "train.steps=2",
    "optimizer.warmup_steps=1",
    "train.precision=fp32",
    "train.eval_interval=1",
    "train.eval_batches=2",
    "tracking.mlflow=false",
    "model.moe.shared_expert_hidden_size=64",
    "memory.prefetch_depth=2",
    # The first step of Adam is the sign of the gradient, which rounding turns where the gradient is next to nothing.
    "optimizer.epsilon=1e-4",
    "memory.optimizer.epsilon=1e-4",
]


def report(overrides: list[str], data_path: str) -> dict[str, Any]:
    """What one rank of a run tells about it: metrics, evaluations, counts, gates."""
    from megamem_launch.compose import build_parts, open_data
    from megamem_launch.run import make_trainer
    from megamem_launch.summary import count_parameters, gate_sample
    from megamem_launch.validate import validate

    config = load_config(None, [*OVERRIDES, *overrides, f"data.path={data_path}"])
    groups = parallel_groups.initialize(validate(config, dist.get_world_size()), seed=config.train.seed)
    parts = build_parts(config, open_data(config), groups)
    numbers: list[float] = []

    class Recorder:
        def step(self, step: int, metrics: dict[str, float]) -> None:
            numbers.extend(metrics[name] for name in ("loss", "grad_norm", "grad_norm_tables", "aux_loss"))

        def evaluation(self, step: int, loss: float, *, blocked: bool) -> None:
            numbers.append(loss)

        def event(self, name: str, step: int, text: str) -> None: ...

    trainer = make_trainer(parts, Recorder(), save=lambda step: None)
    trainer.run()
    result = {
        "numbers": numbers,
        "tokens": trainer.progress.tokens_seen,
        "lookups": parts.memory.stats["lookups"],
        "parameters": count_parameters(parts),
        "gates": gate_sample(parts, trainer.runner),
    }
    parts.close()
    return result


@pytest.mark.parametrize("tensor_parallel", [False, True], ids=["cp2", "cp2-tp2-sp"])
def test_a_run_reports_what_one_process_does(tensor_parallel: bool, prepared_tiny: Path) -> None:
    layout = ["parallel.context_parallel_size=2"]
    if tensor_parallel:
        layout += ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    ranks = 4 if tensor_parallel else 2
    (expected,) = run_distributed(report, 1, [], str(prepared_tiny))
    results = run_distributed(report, ranks, layout, str(prepared_tiny))
    assert len(expected["numbers"]) == 12  # four of each step; evaluations before, after each step, and blocked
    for result in results:
        assert result["numbers"] == pytest.approx(expected["numbers"], rel=1e-5)
        assert result["tokens"] == expected["tokens"]
        assert result["parameters"] == expected["parameters"]
        assert (result["gates"]["tokens"], result["gates"]["layers"]) == (
            expected["gates"]["tokens"],
            expected["gates"]["layers"],
        )
        for gates, whole in zip(result["gates"]["gates"], expected["gates"]["gates"], strict=True):
            assert gates == pytest.approx(whole, abs=2e-4)
    # Every lookup is made by exactly one rank.
    assert sum(result["lookups"] for result in results) == expected["lookups"]
