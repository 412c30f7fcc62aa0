"""The data of one optimizer step, as a loader hands it over. Numpy on the CPU: addresses are computed from it before
anything reaches a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences of one forward pass on one data-parallel rank. ``b`` sequences, ``s`` tokens each."""

    sample_ids: np.ndarray
    """``[b]`` int64, position of each sequence in the global order of samples: the same under every layout."""
    tokens: np.ndarray
    """``[b, s]`` int64 input ids."""
    labels: np.ndarray
    """``[b, s]`` int64, the token that follows each input."""
    loss_mask: np.ndarray
    """``[b, s]`` float32, 1 where the label belongs to the same document as the input, else 0."""
    document_ids: np.ndarray
    """``[b, s]`` int32, document of each token, numbered from 0 over the whole micro-batch in reading order. Never shared by
    two sequences, and contiguous: attention, n-grams and convolutions do not cross from one number to the next."""
    document_paths: np.ndarray
    """``[documents, levels]`` int64, cluster of each document at every level of the tree (level-l ids lie in
    ``[0, branching ** l)`` and are prefixes: parent = id // branching). ``levels`` is 0 where the data has no tree."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(b, s)``."""
        return self.tokens.shape


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All micro-batches of one optimizer step on one data-parallel rank; the same on all its TP, CP and PP ranks."""

    step: int
    micro_batches: tuple[MicroBatch, ...]

    @property
    def loss_tokens(self) -> float:
        """Tokens that count in the loss, on this data-parallel rank."""
        return float(sum(micro.loss_mask.sum(dtype=np.float64) for micro in self.micro_batches))


class TokenLoader(Protocol):
    """A source of step batches: a pure function of the step, so that resuming needs no more than the step counter."""

    def batch(self, step: int) -> StepBatch:
        """The batch of optimizer step ``step`` for this data-parallel rank; any step, in any order."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain data that identifies the data and its order: fingerprints, seed, counters."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that ``state`` describes the same data and order; DataError where it does not."""
        ...

    def close(self) -> None:
        """Stop the background thread and release the files."""
        ...
