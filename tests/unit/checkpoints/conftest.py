"""A run in miniature: parameters with optimizer state, a buffer, two tables, and how a checkpoint gets at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem_checkpoints.checkpointer import Checkpointer
from megamem_checkpoints.config import CheckpointConfig
from megamem_kernels.formats import Field
from megamem_kernels.rounding import quantize_rows

ENGRAM = "decoder.layers.1.engram.table"
BANK = "decoder.layers.0.bank.level1.table"


@dataclass(frozen=True, eq=False)
class Entry:
    """The shape of ``megamem.models.canonical.CanonicalEntry``, without megatron-core."""

    name: str
    tensor: Tensor
    rows: slice
    tp_dim: int | None
    is_copy: bool = False

    @property
    def is_expert(self) -> bool:
        return ".mlp.experts." in self.name


STATE = (Field("exp_avg", torch.float32, (4,)), Field("last_step", torch.int32, ()))


def owned_table(
    name: str, rows: int, width: int, *, seed: int, state_fields: tuple[Field, ...] = STATE, **options: Any
) -> OwnedTable:
    """A table whose every row and state is a function of ``seed`` and the logical row; ``options`` of its creation."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        "rows": torch.randn(rows, width, generator=generator),
        "state.exp_avg": torch.randn(rows, 4, generator=generator),
        "state.last_step": torch.randint(0, 99, (rows,), generator=generator, dtype=torch.int32),
        "state.touched": torch.randint(0, 2, (rows,), generator=generator, dtype=torch.uint8),
    }
    spec = TableSpec(name, rows, width, (InitSegment(width, 0.02),))
    table = OwnedTable.create(spec, seed=seed, state_fields=state_fields, **options)
    if table.committed or state_fields != STATE:
        return table
    logical = torch.from_numpy(table.placement.logical(np.arange(table.start, table.stop)))
    fields = {field.name: field.allocate(len(logical)) for field in table.rows.fields}
    quantize_rows(values.pop("rows")[logical].contiguous(), fields)
    table.write(table.start, {**fields, **{key: value[logical] for key, value in values.items()}})
    return table


class MiniRun:
    """Everything that one process of a run hands to a checkpointer."""

    def __init__(
        self, directory: Path, *, seed: int, hidden: int = 6, keep: int = 2, incremental: str = "off", **tables: Any
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        layer = "decoder.layers.0"
        self.fc1 = nn.Parameter(draw(10, hidden))
        self.embedding = nn.Parameter(draw(7, hidden))
        self.norm = nn.Parameter(draw(hidden))
        self.bias = draw(3)
        self.states = {
            id(p): {"master": p.detach(), "exp_avg": draw(*p.shape), "exp_avg_sq": draw(*p.shape).square()}
            for p in (self.fc1, self.embedding, self.norm)
        }
        self.states[id(self.bias)] = {"master": self.bias}
        self.entries = [
            Entry("embedding.word_embeddings.weight", self.embedding, slice(None), 0),
            Entry(f"{layer}.mlp.linear_fc1.gate.weight", self.fc1, slice(0, 5), 0),
            Entry(f"{layer}.mlp.linear_fc1.up.weight", self.fc1, slice(5, 10), 0),
            Entry(f"{layer}.mlp.router.expert_bias", self.bias, slice(None), None),
            Entry("decoder.final_layernorm.weight", self.norm, slice(None), None),
        ]
        self.tables = {
            ENGRAM: owned_table(ENGRAM, 53, 4, seed=seed, **tables),
            BANK: owned_table(BANK, 5, 9, seed=seed + 1, **tables),
        }
        self.meta: dict[str, Any] = {"seed": seed, "lr": 1e-3, "data": {"order": [1, 2]}, "losses": {"first": 10.25}}
        self.rng = {"tracker.model-parallel-rng": torch.arange(9, dtype=torch.uint8)}
        self.checkpointer = Checkpointer(directory, CheckpointConfig(keep=keep, incremental=incremental), groups=None)

    def save(self, step: int, *, wait: bool = True) -> Path:
        save = self.checkpointer.save if wait else self.checkpointer.start
        return save(
            step,
            entries=self.entries,
            state_of=self.get,
            tables=self.tables,
            meta=self.meta,
            rng=self.rng,
        )

    def get(self, tensor: Tensor) -> dict[str, Tensor]:
        assert isinstance(tensor, nn.Parameter)
        return self.states[id(tensor)]

    def put(self, tensor: Tensor, state: dict[str, Tensor]) -> None:
        assert isinstance(tensor, nn.Parameter)
        for name, value in state.items():
            with torch.no_grad():
                self.states[id(tensor)][name].copy_(value)

    def load(self, path: Path, **options: Any) -> dict[str, Any]:
        return self.checkpointer.load(path, entries=self.entries, put_state=self.put, tables=self.tables, **options)

    def tensors(self) -> dict[str, Tensor]:
        """A copy of everything that a checkpoint holds, by name."""
        named = {
            f"{key}.{entry.name}": value[entry.rows].clone()
            for entry in self.entries
            for key, value in self.states[id(entry.tensor)].items()
        }
        for name, table in self.tables.items():
            named |= {f"{name}.{key}": value for key, value in table.read(table.start, table.stop).items()}
        return named

    def equals(self, other: dict[str, Tensor]) -> bool:
        """Whether everything is bit-identical to a copy from :meth:`tensors`."""
        mine = self.tensors()
        return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.fixture
def mini_run(tmp_path: Path) -> Callable[..., MiniRun]:
    """Makes runs that share the directory ``tmp_path / "checkpoints"``; each seed is another state."""

    def make(seed: int = 0, **options: Any) -> MiniRun:
        return MiniRun(tmp_path / "checkpoints", seed=seed, **options)

    return make
