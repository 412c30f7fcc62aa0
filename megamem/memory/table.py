"""Tables: their description, their initial rows, and the part of them that one rank owns."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megamem.parallel.layout import owner_range

_CHUNK_ELEMENTS = 1 << 18
_TRUNCATION = 2.0


@dataclass(frozen=True, slots=True)
class InitSegment:
    """Initial distribution of ``width`` consecutive columns: normal with mean 0."""

    width: int
    std: float
    """Standard deviation, of the normal before truncation; 0 for zeros."""
    truncated: bool = False
    """Values beyond two standard deviations are drawn again."""


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A logical parameter ``[rows, width]`` in fp32; ``init`` covers the width from left to right."""

    name: str
    rows: int
    width: int
    init: tuple[InitSegment, ...]

    def __post_init__(self) -> None:
        if self.rows < 1 or self.width < 1 or sum(segment.width for segment in self.init) != self.width:
            raise ValueError(f"table {self.name}: [{self.rows}, {self.width}] is not what {self.init} covers")


@dataclass(slots=True)
class OwnedTable:
    """Rows ``[start, stop)`` of a table in host memory, with their optimizer state."""

    spec: TableSpec
    start: int
    stop: int
    rows: Tensor
    """``[stop - start, width]`` fp32."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Tensors ``[stop - start, ...]``: what the row optimizer keeps, and ``touched`` (uint8, 1 for rows ever updated)."""

    @classmethod
    def create(cls, spec: TableSpec, *, owners: int = 1, owner: int = 0, seed: int) -> OwnedTable:
        """The initial rows that ``owner`` of ``owners`` stores; the same values for any number of owners."""
        owned = owner_range(spec.rows, owners, owner)
        return cls(spec, owned.start, owned.stop, initial_rows(spec, owned.start, owned.stop, seed=seed))

    @property
    def usage(self) -> float:
        """Fraction of the owned rows that were ever updated; 0 where none are owned."""
        return int(self.state["touched"].count_nonzero()) / max(1, self.stop - self.start)


def initial_rows(spec: TableSpec, start: int, stop: int, *, seed: int) -> Tensor:
    """Initial rows ``[start, stop)`` of a table, ``[stop - start, width]`` fp32: a function of seed, spec and row.

    Logical rows are drawn in fixed chunks, each from a Philox generator keyed by (seed, name, chunk), so that any cut of
    the table into owners gives the same rows, and only a few chunks (1 MiB, or one row) are allocated beside the result.
    """
    rows = torch.zeros(stop - start, spec.width)
    if not any(segment.std for segment in spec.init):
        return rows
    view = rows.numpy()
    chunk_rows = max(1, _CHUNK_ELEMENTS // spec.width)
    for chunk in range(start // chunk_rows, -(-stop // chunk_rows)):
        first = chunk * chunk_rows
        low, high = max(start, first), min(stop, first + chunk_rows)
        generator = _generator(seed, spec.name, chunk)
        column = 0
        for segment in spec.init:
            if segment.std:
                values = _draw(generator, (chunk_rows, segment.width), segment)
                view[low - start : high - start, column : column + segment.width] = values[low - first : high - first]
            column += segment.width
    return rows


def _draw(generator: np.random.Generator, shape: tuple[int, int], segment: InitSegment) -> np.ndarray:
    values = generator.standard_normal(shape, dtype=np.float32)
    if segment.truncated:
        while (outside := np.abs(values) > _TRUNCATION).any():
            values[outside] = generator.standard_normal(int(outside.sum()), dtype=np.float32)
    values *= np.float32(segment.std)
    return values


def _generator(seed: int, name: str, chunk: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"table:{seed}:{name}:{chunk}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
