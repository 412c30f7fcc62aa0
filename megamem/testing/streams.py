"""A stream of hashed addresses and step batches without a data pipeline: for tests of the memory engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megamem.batch import MicroBatch, StepBatch
from megamem.memory.spec import InitSegment, TableSpec


class HashedStream:
    """``k`` rows per token, a function of token and sample; evaluation reads row 0. One table per width."""

    def __init__(self, name: str, rows: int, widths: Sequence[int], k: int = 2) -> None:
        self.name, self.rows, self.k = name, rows, k
        self.tables: tuple[TableSpec, ...] = tuple(
            TableSpec(f"{name}.{i}", rows, width, (InitSegment(width, 0.5),)) for i, width in enumerate(widths)
        )

    def addresses(self, micro: MicroBatch, positions: slice, *, train: bool = True) -> np.ndarray:
        """See :class:`megamem.memory.streams.Stream`."""
        tokens = micro.tokens[:, positions, None]
        ids = (tokens * 13 + np.arange(self.k) * (5 + micro.sample_ids[:, None, None])) % self.rows
        return ids if train else np.zeros_like(ids)


def step_batch(
    step: int,
    *,
    sequences: int = 4,
    length: int = 6,
    micro_batch_size: int = 2,
    vocabulary: int = 64,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> StepBatch:
    """The share of data-parallel rank ``dp_rank`` of random sequences, which are the same for any number of ranks."""
    tokens = np.random.default_rng(step).integers(0, vocabulary, (sequences, length))
    sample_ids = np.arange(sequences) + sequences * step
    share = sequences // dp_size
    micros = []
    for start in range(dp_rank * share, (dp_rank + 1) * share, micro_batch_size):
        part = slice(start, min(start + micro_batch_size, (dp_rank + 1) * share))
        micros.append(
            MicroBatch(
                sample_ids=sample_ids[part],
                tokens=tokens[part],
                labels=tokens[part],
                loss_mask=np.ones(tokens[part].shape, dtype=np.float32),
                document_ids=np.zeros(tokens[part].shape, dtype=np.int32),
                document_paths=np.zeros((1, 0), dtype=np.int64),
            )
        )
    return StepBatch(step=step, micro_batches=tuple(micros))
