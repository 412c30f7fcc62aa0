"""An imported model computes what transformers computes, whatever layout loads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megamem.memory.config import MemoryConfig
from megamem.models.canonical import canonical_entries
from megamem.models.gpt import build_model
from megamem.parallel.groups import destroy, initialize
from megamem.parallel.layout import Layout
from megamem.testing.distributed import run_distributed
from megamem.testing.pretrained import FAMILIES, VOCABULARY, write_pretrained
from megamem_checkpoints.checkpointer import Checkpointer
from megamem_checkpoints.config import CheckpointConfig
from megamem_checkpoints.directory import find_checkpoint
from megamem_launch.config import load_config
from megamem_launch.verbs import import_

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    # Heads of six frequencies, of which the scaling leaves some, slows some and blends one.
    "llama-3.1": ("llama", {"rope_parameters": SCALED, "head_dim": 12, "tie_word_embeddings": False}),
}


def tokens() -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, VOCABULARY, (2, 32)))


def logits_of(cases: list[tuple[Layout, dict[str, str]]]) -> list[dict[str, np.ndarray]]:
    """For every layout the logits ``[b, s, vocabulary]`` of its runs, on ranks of the last pipeline stage."""
    return [_logits_under(layout, runs) for layout, runs in cases]


def _logits_under(layout: Layout, runs: dict[str, str]) -> dict[str, np.ndarray]:
    groups = initialize(layout, seed=0)
    found = {}
    for name, run in runs.items():
        model = load_config(run).model
        gpt = nn.ModuleList(
            [
                build_model(
                    model,
                    MemoryConfig(),
                    groups=groups,
                    seq_length=32,
                    dtype=torch.float32,
                    seed=5,
                    sequence_parallel=layout.tp > 1,
                )
            ]
        )
        Checkpointer(Path(run) / "checkpoints", CheckpointConfig(), groups=groups).load(
            find_checkpoint(Path(run)),
            entries=canonical_entries(gpt, groups),
            put_state=lambda parameter, states: parameter.data.copy_(states["master"]),
            tables={},
            optimizer_state=False,
        )

        def forward(iterator: Iterator[Tensor], chunk: GPTModel) -> tuple[Tensor, Any]:
            ids = next(iterator)
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            return chunk(ids, positions, None, runtime_gather_output=True), lambda logits, non_loss_data: logits

        with torch.no_grad():
            outputs = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter([tokens()]),
                model=list(gpt),
                num_microbatches=1,
                seq_length=32,
                micro_batch_size=2,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if groups.is_last_stage:
            found[name] = outputs[0][..., :VOCABULARY].numpy().copy()
    destroy()
    return found


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    expected, runs = {}, {}
    for name, (family, changes) in MODELS.items():
        reference = write_pretrained(tmp_path / "hf" / name, family, **changes)
        with torch.no_grad():
            expected[name] = reference(tokens()).logits.numpy()
        runs[name] = str(tmp_path / "runs" / name)
        import_.main([str(tmp_path / "hf" / name), runs[name]])
    experts = {name: runs[name] for name in ("qwen3_moe", "mixtral")}
    cases = [(Layout(world_size=4, tp=2, pp=2), runs), (Layout(world_size=4, pp=2, ep=2), experts)]
    for case, results in zip(cases, zip(*run_distributed(logits_of, 4, cases), strict=True), strict=True):
        seen = [found for found in results if found]
        assert len(seen) == 2
        for found in seen:
            assert found.keys() == case[1].keys()
            for name, logits in found.items():
                assert np.abs(expected[name]).max() > 1
                np.testing.assert_allclose(logits, expected[name], atol=1e-5, rtol=1e-5, err_msg=name)
