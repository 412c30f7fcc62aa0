"""Elements of CPU kernels: bf16 as torch has it, and the sigmoid against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from megamem_kernels.elements import elements, load, sigmoid, store


@njit
def _copy(source: np.ndarray, target: np.ndarray) -> None:
    for i in range(len(source)):
        store(target, i, load(source[i]))


@njit
def _sigmoids(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        out[i] = sigmoid(x[i])


def test_bf16_is_that_of_torch() -> None:
    """Every bf16 pattern and, for rounding, each with all kinds of lower halves: ties, overflow to infinity, NaN."""
    patterns = torch.arange(2**16, dtype=torch.int32)
    every = patterns.to(torch.uint16).view(torch.bfloat16)
    widened, rounded = torch.full((2**16,), torch.nan), torch.zeros(2**16, dtype=torch.bfloat16)
    _copy(elements(every), elements(widened))
    torch.testing.assert_close(widened, every.float(), rtol=0, atol=0, equal_nan=True)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (patterns * 2**16 + low).view(torch.float32)
        _copy(elements(values), elements(rounded))
        torch.testing.assert_close(rounded, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_sigmoid() -> None:
    x = np.concatenate([np.linspace(-87, 87, 200_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    out = np.full_like(x, np.nan)
    _sigmoids(x, out)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(out, exact, rtol=2 * 2.0**-23)
    extremes = np.array([-np.inf, -1e30, 0.0, 1e30, np.inf, np.nan], np.float32)
    _sigmoids(extremes, out := np.empty(6, np.float32))
    np.testing.assert_allclose(out, [0, 0, 0.5, 1, 1, np.nan], atol=2e-38)


def test_elements_are_the_tensor_itself() -> None:
    tensor = torch.zeros(3, 2, dtype=torch.bfloat16)
    elements(tensor)[1, 1] = 0x3F80
    assert tensor[1, 1] == 1.0 and tensor.sum() == 1.0
    with pytest.raises(AssertionError):
        elements(tensor.t())
