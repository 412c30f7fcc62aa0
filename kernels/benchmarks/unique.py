"""Distinct row ids with their inverse, beside torch and numpy."""

from __future__ import annotations

import numpy as np
import torch
from harness import Case, Contender, Options

from megamem_kernels.unique import unique


def cases(options: Options) -> list[Case]:
    """16k tokens x 16 rows, over tables of the default, the published and the largest known size."""
    generator = np.random.default_rng(options.seed)
    count = 1024 if options.quick else 16_384 * 16
    return [
        _case(f"{count} {distribution} ids of {bound / 1e6:g}M", draw(generator, bound, count), bound)
        for bound in (1_048_576, 36_200_000, 384_000_000)
        for distribution, draw in (("Zipf(1.05)", _zipf), ("uniform", _uniform))
    ]


def _case(name: str, ids: np.ndarray, bound: int) -> Case:
    tensor = torch.from_numpy(ids)
    return Case(
        f"unique, {name}",
        [
            Contender("megamem", lambda: unique(ids, bound)),
            Contender("torch.unique", lambda: torch.unique(tensor, return_inverse=True)),
            Contender("np.unique", lambda: np.unique(ids, return_inverse=True)),
        ],
    )


def _uniform(generator: np.random.Generator, bound: int, count: int) -> np.ndarray:
    return generator.integers(0, bound, count)


def _zipf(generator: np.random.Generator, bound: int, count: int) -> np.ndarray:
    """Ranks whose density falls as rank**-1.05 (the quantile function of the continuous law), scattered over the table."""
    power = 1 - 1.05
    ranks = (1 - generator.random(count) * (1 - (bound + 1.0) ** power)) ** (1 / power) - 1
    return np.minimum(ranks.astype(np.int64), bound - 1) * 2_654_435_761 % bound
