"""The global order of samples: pure functions of integers, so that any step can be computed without what came before.

Sample ``g`` is the ``g``-th sequence that training reads. It belongs to epoch ``g // windows`` and shows window
``permute(g % windows)`` of the corpus, where the permutation depends on the seed and the epoch. No index is stored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from megamem.errors import ConfigError

_ROUNDS = 4


def derive_key(*parts: str | int) -> int:
    """A 64-bit key from a name and integers; different parts give independent keys."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64: a bijection of uint64 whose every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of ``indices`` (int64, each in ``[0, size)``) under a pseudo-random permutation of ``range(size)``.

    A 4-round Feistel network over the next even power of two, whose results outside ``range(size)`` go through the
    network again (cycle walking): at most four times as many evaluations as indices on average, and no memory.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.array([derive_key("feistel", key, number) for number in range(_ROUNDS)], dtype=np.uint64)
    result = indices.astype(np.uint64)
    pending = np.arange(len(result))
    while len(pending):
        left, right = result[pending] >> half, result[pending] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        result[pending] = (left << half) | right
        pending = pending[result[pending] >= size]
    return result.astype(np.int64)


def window_of_sample(sample_ids: np.ndarray, windows: int, seed: int | None) -> np.ndarray:
    """Window of each sample, int64: shuffled anew in every epoch, in corpus order where ``seed`` is None."""
    epochs, positions = np.divmod(sample_ids, windows)
    if seed is None:
        return positions
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        positions[chosen] = permute(positions[chosen], windows, derive_key("epoch", seed, int(epoch)))
    return positions


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """What one data-parallel rank reads of each global batch; ConfigError where the sizes do not divide."""

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        unit = self.micro_batch_size * self.dp_size
        if self.global_batch_size % unit:
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of train.micro_batch_size="
                f"{self.micro_batch_size} x {self.dp_size} data-parallel ranks; set it to a multiple of {unit}"
            )

    def samples(self, step: int) -> np.ndarray:
        """Sample ids of the rank's micro-batches in optimizer step ``step``: ``[micro_batches, micro_batch_size]``
        int64.

        Micro-batch ``m`` of rank ``r`` holds samples ``(m * dp_size + r) * micro_batch_size`` onwards of the step, so
        all ranks together read the same samples under every layout.
        """
        batch = np.arange(self.global_batch_size, dtype=np.int64).reshape(-1, self.dp_size, self.micro_batch_size)
        return step * self.global_batch_size + batch[:, self.dp_rank]


def held_out(documents: int, fraction: float, seed: int) -> np.ndarray:
    """Which documents belong to the validation split, ``[documents]`` bool: a hash of each number alone decides."""
    numbers = np.arange(documents, dtype=np.uint64)
    hashed = mix(numbers ^ np.uint64(derive_key("validation", seed)))
    return (hashed >> np.uint64(11)).astype(np.float64) < fraction * 2.0**53
