"""Constants of the n-gram hash: multipliers, one prime per head, and where each head starts in its layer's table.

A pure function of the configuration, so every rank, checkpoint and export computes the same addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamem.memory.config import EngramConfig

_INT64_MAX = 2**63 - 1
# These bases decide primality for every integer below 3.3e24 (Sorenson and Webster, 2015), which covers int64.
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


@dataclass(frozen=True, slots=True, eq=False)
class HashSpec:
    """The hash of one layer; ``orders = len(config.orders)``."""

    layer: int
    multipliers: np.ndarray
    """``[orders + 1]`` int64, odd, one per look-back. Write them to JSON as strings: a double cannot hold them."""
    primes: np.ndarray
    """``[orders, heads]`` int64: rows of each head."""
    offsets: np.ndarray
    """``[orders * heads]`` int64: first row of each head, in the order of ``primes``."""

    @property
    def rows(self) -> int:
        """Rows of the layer's table."""
        return int(self.primes.sum())


def hash_specs(config: EngramConfig, vocab_size: int) -> dict[int, HashSpec]:
    """The hash of every Engram layer of the model, by layer.

    No two heads of any layers share a prime, so a stage calls this for the whole model and picks its own layers.

    Args:
        config: layers are taken in the order written: it decides who gets which primes.
        vocab_size: distinct ids that are hashed: canonical ones where tokens are folded, else entries of the tokenizer.
            It bounds the multipliers such that no product leaves int64.
    """
    specs = {}
    taken: set[int] = set()
    for layer in config.layers:
        primes = np.array(
            [_primes_from(config.rows_per_head, config.heads, taken) for _ in config.orders], dtype=np.int64
        )
        sizes = primes.ravel()
        specs[layer] = HashSpec(
            layer=layer,
            multipliers=_multipliers(config.seed + 10007 * layer, max(config.orders), vocab_size),
            primes=primes,
            offsets=np.cumsum(sizes) - sizes,
        )
    return specs


def _multipliers(seed: int, count: int, vocab_size: int) -> np.ndarray:
    bound = max(1, _INT64_MAX // vocab_size // 2)
    return 2 * np.random.default_rng(seed).integers(low=0, high=bound, size=count, dtype=np.int64) + 1


def _primes_from(minimum: int, count: int, taken: set[int]) -> list[int]:
    """The ``count`` smallest primes from ``minimum`` on that are not in ``taken``, which they join."""
    primes: list[int] = []
    candidate = minimum
    while len(primes) < count:
        if candidate not in taken and is_prime(candidate):
            primes.append(candidate)
        candidate += 1
    taken.update(primes)
    return primes


def is_prime(number: int) -> bool:
    """Whether a non-negative ``number`` below 2**64 is prime: Miller-Rabin with bases that leave no doubt."""
    if number < 2:
        return False
    for prime in _WITNESSES:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_is_witnessed(number, base, odd, twos) for base in _WITNESSES)


def _is_witnessed(number: int, base: int, odd: int, twos: int) -> bool:
    power = pow(base, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False
