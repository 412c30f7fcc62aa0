"""Fetch plans: which rows one rank needs for one optimizer step, from whom, and where each lookup finds its row.

Computed on the CPU from data alone, so that a plan can be made before the step it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megamem.batch import StepBatch
from megamem.errors import ConfigError
from megamem.memory.placement import Placement
from megamem.parallel.layout import rows_per_owner
from megamem_kernels.unique import unique

if TYPE_CHECKING:
    from megamem.memory.streams import Stream


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """One stream's part of a fetch plan."""

    ids: np.ndarray
    """``[unique]`` int64, distinct positions (:class:`~megamem.memory.placement.Placement`) in ascending order, and so grouped
    by owner."""
    inverse: tuple[np.ndarray, ...]
    """Per micro-batch, int64 of the shape of its addresses: ``ids[inverse[i]]`` are their positions."""
    counts: tuple[int, ...]
    """Rows that each owner is asked for; sums to ``unique``."""

    @property
    def lookups(self) -> int:
        """Addresses before de-duplication."""
        return sum(inverse.size for inverse in self.inverse)


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What one rank fetches for one optimizer step, by stream name."""

    step: int
    train: bool
    micro_batches: int
    streams: dict[str, StreamPlan]


def plan_stream(name: str, placement: Placement, addresses: Sequence[np.ndarray], owners: int) -> StreamPlan:
    """De-duplicate the addresses of all micro-batches of a step.

    Args:
        name: Name of the stream, for errors.
        placement: Where its rows are.
        addresses: One int64 array of any shape per micro-batch, values in ``[0, placement.rows)``.
        owners: Size of the memory group.

    Raises:
        ValueError: an address lies outside ``[0, placement.rows)``.
    """
    rows = placement.rows
    flat = np.concatenate([array.reshape(-1) for array in addresses] or [np.empty(0, dtype=np.int64)])
    # Before rows are placed: a scrambled position is inside the table whatever the address.
    if flat.size and ((low := flat.min()) < 0 or flat.max() >= rows):
        raise ValueError(f"stream {name} gave address {low if low < 0 else flat.max()}, outside its {rows} rows")
    ids, inverse = unique(placement.positions(flat), rows)
    edges = np.minimum(np.arange(owners + 1) * rows_per_owner(rows, owners), rows)
    counts = np.diff(np.searchsorted(ids, edges))
    pieces = np.split(inverse, np.cumsum([array.size for array in addresses])[:-1]) if addresses else []
    return StreamPlan(
        ids=ids,
        inverse=tuple(piece.reshape(array.shape) for piece, array in zip(pieces, addresses, strict=True)),
        counts=tuple(counts.tolist()),
    )


def plan_step(
    batch: StepBatch,
    streams: Sequence[Stream],
    placements: Mapping[str, Placement],
    *,
    owners: int,
    slice_index: int = 0,
    slices: int = 1,
    train: bool = True,
) -> FetchPlan:
    """The fetch plan of one rank: addresses of its slice of every sequence, of all micro-batches, de-duplicated.

    Args:
        batch: The data of the step.
        streams: Sources of addresses.
        placements: By stream, where its rows are.
        owners: Size of the memory group.
        slice_index: This rank's slice of every sequence.
        slices: Slices of every sequence.
        train: Whether the step trains; streams may address rows otherwise at evaluation.

    Raises:
        ConfigError: the sequence length cannot be cut into ``slices`` equal slices.
    """
    plans = {}
    for stream in streams:
        addresses = [
            stream.addresses(micro, _slice(micro.shape[1], slice_index, slices), train=train)
            for micro in batch.micro_batches
        ]
        plans[stream.name] = plan_stream(stream.name, placements[stream.name], addresses, owners)
    return FetchPlan(step=batch.step, train=train, micro_batches=len(batch.micro_batches), streams=plans)


def _slice(length: int, slice_index: int, slices: int) -> slice:
    if length % slices:
        raise ConfigError(
            f"data.seq_length={length} cannot be shared equally by the parallel.context_parallel_size x "
            f"parallel.tensor_model_parallel_size = {slices} ranks; set it to a multiple of {slices}"
        )
    size = length // slices
    return slice(slice_index * size, (slice_index + 1) * size)
