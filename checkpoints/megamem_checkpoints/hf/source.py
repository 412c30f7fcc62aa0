"""What an export reads: one checkpoint, its configuration, and the files that were prepared with its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megamem.config.base import build
from megamem.memory.config import MemoryConfig
from megamem.models.config import ModelConfig
from megamem_kernels.formats import FormatName
from megamem_kernels.row_gather import dequantize_rows

PIECE_BYTES = 64 * 2**20
"""Upper bound of one piece of a table, as fp32 values."""


class Reader(Protocol):
    """What an export needs of :class:`~megamem_checkpoints.reader.CheckpointReader`."""

    @property
    def step(self) -> int: ...

    @property
    def meta(self) -> dict[str, Any]: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...

    def tables(self) -> dict[str, tuple[int, int]]: ...

    def format(self, table: str) -> FormatName: ...

    def stored_rows(self, table: str, start: int, stop: int) -> dict[str, Tensor]: ...

    def verify(self) -> None: ...


@dataclass(frozen=True)
class Source:
    """A checkpoint to export, with everything that a target may ask about it."""

    reader: Reader
    model: ModelConfig
    memory: MemoryConfig
    tokenizer: Path
    """The tokenizer that the run was trained with."""
    clusters: Path
    """Cluster tree of the documents; exists for models with a bank."""
    dtype: torch.dtype
    """Of exported dense parameters: fp32 or bf16."""

    @classmethod
    def open(
        cls, reader: Reader, *, tokenizer: Path, clusters: Path, dtype: Literal["auto", "fp32", "bf16"] = "auto"
    ) -> Source:
        """The source of ``reader``; ``auto`` is bf16 for a run that trained in bf16, else fp32."""
        config = reader.meta["config"]
        name = reader.meta["precision"] if dtype == "auto" else dtype
        return cls(
            reader=reader,
            model=build(ModelConfig, config["model"]),
            memory=build(MemoryConfig, config["memory"]),
            tokenizer=tokenizer,
            clusters=clusters,
            dtype=torch.bfloat16 if name == "bf16" else torch.float32,
        )

    @property
    def meta(self) -> Mapping[str, Any]:
        """What the run saved beside its tensors: ``config``, ``eos_id``, ``tokens_seen``, ..."""
        return self.reader.meta

    @property
    def eos_id(self) -> int:
        """The end-of-document token."""
        return int(self.meta["eos_id"])

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, without the rows that pad the embedding."""
        return self.model.vocab_size

    @property
    def seq_length(self) -> int:
        """Tokens of one sequence in training."""
        return int(self.meta["config"]["data"]["seq_length"])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every dense tensor and every table, by canonical name."""
        return {name: self.reader.shape(name) for name in self.reader.names()} | self.tables()

    def tables(self) -> dict[str, tuple[int, int]]:
        """``(rows, width)`` of every memory table."""
        return self.reader.tables()

    def tensor(self, name: str) -> Tensor:
        """A dense tensor, whole, fp32."""
        return self.reader.tensor(name)

    def parts_reader(self, names: Iterable[str]) -> Callable[[str], Tensor]:
        """:meth:`tensor` for a plan that reads ``names``, one for each exported tensor. The last of those that are named
        several times is kept: files are ordered by name, so that what lies between its parts is little else of its layer."""
        shared = {name for name, count in Counter(names).items() if count > 1}
        keep = lru_cache(maxsize=1)(self.tensor)
        return lambda name: keep(name) if name in shared else self.tensor(name)

    def stored_pieces(self, table: str, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Rows ``[start, stop)`` as the run stores them, piece by piece, by the fields of their format
        (:func:`~megamem_kernels.formats.row_fields`)."""
        rows, width = self.tables()[table]
        stop = rows if stop is None else stop
        step = max(1, PIECE_BYTES // (4 * width))
        for first in range(start, stop, step):
            yield self.reader.stored_rows(table, first, min(first + step, stop))

    def table_pieces(self, table: str, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The values of rows ``[start, stop)`` in ``dtype``, ``[n, width]`` a piece."""
        width = self.tables()[table][1]
        for fields in self.stored_pieces(table, start, stop):
            count = len(next(iter(fields.values())))
            yield dequantize_rows(fields, torch.empty(count, width)).to(dtype)
