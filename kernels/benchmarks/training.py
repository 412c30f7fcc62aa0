"""A trainer over random text without files: what the benchmarks of whole steps measure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamem.batch import MicroBatch, StepBatch
from megamem.memory.config import MemoryConfig
from megamem.memory.engine import MemoryEngine
from megamem.memory.links import create_links
from megamem.memory.streams import build_streams
from megamem.models.config import ModelConfig
from megamem.models.gpt import build_model
from megamem.parallel import groups as parallel_groups
from megamem.parallel.layout import Layout
from megamem.parallel.zero import ZeroEngine
from megamem.train.config import OptimizerConfig, TrainConfig
from megamem.train.step import StepRunner
from megamem.train.trainer import Trainer

VOCABULARY = 8192
EOS = 0


@dataclass
class ZipfLoader:
    """Documents of Zipf-distributed tokens, packed; a pure function of the step."""

    seq_length: int
    micro_batch_size: int
    micro_batches: int
    dp_rank: int
    _weights: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        weights = np.arange(1, VOCABULARY, dtype=np.float64) ** -1.0
        self._weights = np.cumsum(weights / weights.sum())

    def batch(self, step: int) -> StepBatch:
        rng = np.random.default_rng((step, self.dp_rank))
        return StepBatch(step=step, micro_batches=tuple(self._micro(rng) for _ in range(self.micro_batches)))

    def _micro(self, rng: np.random.Generator) -> MicroBatch:
        shape = (self.micro_batch_size, self.seq_length)
        text = 1 + np.searchsorted(self._weights, rng.random((shape[0], shape[1] + 1))).clip(max=VOCABULARY - 2)
        ends = rng.random(shape) < 1 / 256
        documents = np.cumsum(ends, axis=1)
        documents += np.arange(shape[0])[:, None] * (shape[1] + 1)
        _, documents = np.unique(documents, return_inverse=True)
        return MicroBatch(
            sample_ids=np.arange(shape[0]),
            tokens=np.ascontiguousarray(text[:, :-1]),
            labels=np.ascontiguousarray(text[:, 1:]),
            loss_mask=np.ones(shape, dtype=np.float32),
            document_ids=documents.reshape(shape).astype(np.int32),
            document_paths=np.zeros((int(documents.max()) + 1, 0), dtype=np.int64),
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state

    def close(self) -> None:
        pass


class Recorder:
    """An observer that keeps the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)

    def evaluation(self, step: int, loss: float, *, blocked: bool) -> None:
        del step, loss, blocked

    def event(self, name: str, step: int, text: str) -> None:
        del name, step, text


def make_trainer(
    model: ModelConfig,
    memory: MemoryConfig,
    *,
    seq_length: int,
    micro_batches: int,
    steps: int,
    disk_root: Path,
    groups: parallel_groups.Groups | None = None,
    engine_for: Any = None,
) -> tuple[Trainer, Recorder]:
    """One data-parallel rank of a trainer over the default process group; ``engine_for(streams)`` may replace the engine."""
    world = torch.distributed.get_world_size()
    groups = groups or parallel_groups.initialize(Layout(world_size=world), seed=1)
    optimizer = OptimizerConfig(warmup_steps=0, schedule="constant")
    module = build_model(
        model, memory, groups=groups, seq_length=seq_length, dtype=torch.float32, seed=1, sequence_parallel=False
    )
    zero = ZeroEngine(
        module,
        optimizer=optimizer,
        groups=groups,
        precision="fp32",
        micro_batch_size=1,
        gradient_accumulation_steps=micro_batches,
    )
    streams = build_streams(model, memory, layers=range(model.num_layers), eos_id=EOS, fold=None, seed=1)
    if engine_for is not None:
        engine = engine_for(streams)
    else:
        engine = MemoryEngine(
            streams,
            memory=memory,
            seed=1,
            links=create_links(groups.layout, memory, groups.device),
            device="cpu",
            disk_root=disk_root,
        )
    recorder = Recorder()
    trainer = Trainer(
        config=TrainConfig(steps=steps, global_batch_size=micro_batches * world, eval_batches=0),
        optimizer=optimizer,
        groups=groups,
        model=module,
        zero=zero,
        memory=engine,
        runner=StepRunner(zero.module, groups, seq_length=seq_length, micro_batch_size=1),
        loader=ZipfLoader(seq_length, 1, micro_batches, groups.coordinates.dp),
        validation=None,
        observer=recorder,
        save=lambda step: None,
        checkpoint_interval=0,
        memory_config=memory,
    )
    return trainer, recorder


def run_steps(trainer: Trainer, count: int) -> Iterator[int]:
    """Train ``count`` steps, yielding after each."""
    for _ in range(count):
        trainer._step(trainer.progress.step)
        trainer.progress.step += 1
        yield trainer.progress.step
