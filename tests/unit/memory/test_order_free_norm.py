from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megamem.memory.norm import order_free_sum
from megamem_kernels.parallel import set_threads
from megamem_kernels.row_squares import row_squares
from megamem_kernels.row_squares.reference import row_squares as reference


class Ranks:
    """Runs the reduction for several shares of the values, phase by phase, as ranks would."""

    def __init__(self, shares: list[np.ndarray]) -> None:
        self.shares = shares

    def sum(self) -> float:
        greatest = max(float(np.max(share, initial=0.0)) for share in self.shares)
        results = []
        limbs: list[np.ndarray] = []

        def collect(array: np.ndarray, operation: str) -> np.ndarray:
            if operation == "max":
                return np.array([greatest])
            limbs.append(array)
            return array

        for share in self.shares:
            order_free_sum(share, collect)
        total = sum(limbs)
        for share in self.shares:
            reduced = order_free_sum(share, lambda a, op: np.array([greatest]) if op == "max" else total)
            results.append(reduced)
        assert len(set(results)) == 1
        return results[0]


@pytest.mark.parametrize("spread", [0.0, 5.0, 40.0])
def test_sum_is_the_same_for_any_order_and_any_cut(spread: float) -> None:
    rng = np.random.default_rng(1)
    values = rng.random(10_001) * 10 ** (spread * (rng.random(10_001) - 0.5))
    exact = math.fsum(values)
    sums = set()
    for owners in (1, 2, 3, 7):
        shuffled = rng.permutation(values)
        sums.add(Ranks(np.array_split(shuffled, owners)).sum())
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(exact, rel=1e-14)
    if spread == 0:
        assert len({float(np.sum(rng.permutation(values))) for _ in range(200)}) > 1, "plain sums depend on the order"


def alone(array: np.ndarray, _: str) -> np.ndarray:
    return array


def test_sum_of_nothing_of_zeros_and_of_what_is_not_finite() -> None:
    assert order_free_sum(np.empty(0), alone) == 0.0
    assert order_free_sum(np.zeros(5), alone) == 0.0
    assert order_free_sum(np.array([1.0, np.inf]), alone) == math.inf
    assert order_free_sum(np.array([1.0, np.nan]), alone) == math.inf
    assert order_free_sum(np.array([5e-324, 0.0]), alone) == 5e-324
    assert order_free_sum(np.array([1e300] * 3), alone) == pytest.approx(3e300)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 33), (9001, 5)])
def test_row_squares_equal_the_definition_for_any_number_of_threads(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e3
    results = []
    for count in (1, 3):
        set_threads(count)
        results.append(row_squares(values))
    set_threads(0)
    assert np.array_equal(*results)
    np.testing.assert_allclose(results[0], reference(values).numpy(), rtol=1e-12)
