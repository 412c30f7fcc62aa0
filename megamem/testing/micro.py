"""A micro-batch's memory without an engine, and packed documents: for tests of modules that read rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FixedMemory:
    """Working sets and indices as the engine's ``MicroMemory`` hands them out."""

    tables: dict[str, Tensor]
    """``[unique, width]`` by table name."""
    indices: dict[str, np.ndarray]
    """``[b, s / slices, k]`` int64 by stream name."""

    def rows(self, table: str) -> Tensor:
        """Working set of a table."""
        return self.tables[table]

    def index(self, stream: str) -> Tensor:
        """Indices of a stream as a tensor."""
        return torch.from_numpy(self.indices[stream])

    def host_index(self, stream: str) -> np.ndarray:
        """Indices of a stream as numpy."""
        return self.indices[stream]

    def lookup(self, table: str, stream: str) -> Tensor:
        """The addressed rows, by torch alone."""
        return F.embedding(self.index(stream).transpose(0, 1), self.tables[table])


def packed_documents(rng: np.random.Generator, batch: int, length: int, *, boundary: float = 0.3) -> np.ndarray:
    """``[b, s]`` int32 document ids, numbered over the batch; ``boundary`` is the chance that one starts."""
    starts = rng.random((batch, length)) < boundary
    starts[:, 0] = True
    return (np.cumsum(starts).reshape(batch, length) - 1).astype(np.int32)
