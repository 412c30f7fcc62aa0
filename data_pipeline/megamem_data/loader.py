"""From prepared data to step batches: any step, in any order, the same global batch under every layout."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from megamem.batch import MicroBatch, StepBatch
from megamem.errors import DataError
from megamem_data.order import BatchSlice, window_of_sample
from megamem_data.packing import pack
from megamem_data.prepared import PreparedData


def build_loader(
    prepared: PreparedData,
    *,
    split: Literal["train", "validation"],
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    levels: int,
) -> PackedLoader:
    """The loader of one data-parallel rank. Training order is shuffled by ``seed`` in every epoch, validation order
    is fixed and wraps around; documents carry their first ``levels`` clusters.

    Raises ConfigError where the batch sizes do not divide, DataError where the split is shorter than one sequence or
    the data has fewer cluster levels.
    """
    part = BatchSlice(global_batch_size, micro_batch_size, dp_rank, dp_size)
    return PackedLoader(prepared, split, part, seq_length=seq_length, seed=seed, levels=levels)


class PackedLoader:
    """A :class:`~megamem.batch.TokenLoader` over one split. While a step is used, one thread packs the next."""

    def __init__(
        self,
        prepared: PreparedData,
        split: Literal["train", "validation"],
        part: BatchSlice,
        *,
        seq_length: int,
        seed: int,
        levels: int,
    ) -> None:
        if levels > prepared.levels:
            raise DataError(
                f"memory.bank.units asks for {levels} levels but {prepared.path} has a cluster tree of "
                f"{prepared.levels}; prepare the data again with this configuration, or set fewer units"
            )
        self._prepared = prepared
        self._part = part
        self._stream = prepared.stream(split)
        self._paths = prepared.document_paths[:, :levels]
        self._seq_length = seq_length
        self._seed = seed if split == "train" else None
        self.windows = self._stream.windows(seq_length)
        """Sequences of one epoch."""
        if not self.windows:
            remedy = (
                "raise data.validation_fraction and prepare the data again, or lower data.seq_length"
                if split == "validation"
                else "add text to data.sources, or lower data.seq_length"
            )
            raise DataError(
                f"the {split} split of {prepared.path} has {len(self._stream):,} tokens, fewer than one sequence of "
                f"data.seq_length={seq_length} and its last label; {remedy}"
            )
        self._identity = {
            "data": prepared.fingerprint,
            "split": split,
            "data.seq_length": seq_length,
            "train.global_batch_size": part.global_batch_size,
            "train.seed": seed,
        }
        self._steps = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamem-loader")
        self._next: tuple[int, Future[StepBatch]] | None = None

    def batch(self, step: int) -> StepBatch:
        """The batch of optimizer step ``step``; DataError where the files hold ids that the tokenizer does not have."""
        ahead, self._next = self._next, None
        result = ahead[1].result() if ahead and ahead[0] == step else self._pack(step)
        self._steps = step + 1
        self._next = (step + 1, self._thread.submit(self._pack, step + 1))
        return result

    def state_dict(self) -> dict[str, Any]:
        """What identifies data and order, and how far they were read (``steps``, ``samples``): plain data."""
        return {**self._identity, "steps": self._steps, "samples": self._steps * self._part.global_batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the state of a loader of the same data and order, whatever its layout; DataError names what
        differs."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                what = f"the fingerprint of {self._prepared.path}" if name == "data" else name
                raise DataError(
                    f"this run read its data in another order: {what} was {state.get(name)} and is {value} now; "
                    "set it back, or start a new run"
                )
        self._steps = int(state["steps"])

    def close(self) -> None:
        """Stop the thread; the loader hands out nothing afterwards."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _pack(self, step: int) -> StepBatch:
        samples = self._part.samples(step)
        windows = window_of_sample(samples, self.windows, self._seed)
        return StepBatch(step=step, micro_batches=tuple(map(self._micro_batch, windows, samples)))

    def _micro_batch(self, windows: np.ndarray, sample_ids: np.ndarray) -> MicroBatch:
        micro = pack(self._stream, windows, sample_ids, self._seq_length, self._paths)
        highest = max(int(micro.tokens.max()), int(micro.labels.max()))
        if highest >= self._prepared.vocab_size:
            raise DataError(
                f"{self._prepared.path} holds the token id {highest}, which its tokenizer does not have: a shard is "
                "damaged; delete its folder and prepare again"
            )
        return micro
