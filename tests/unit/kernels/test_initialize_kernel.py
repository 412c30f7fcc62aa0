"""Initial rows: the normal distribution, as a function of (key, row, element) and of nothing else."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from megamem_kernels.initialize import normal_rows, op
from megamem_kernels.initialize.reference import normal_row_reference
from megamem_kernels.parallel import set_threads

KEY = 2**64 - 5


def filled(rows: np.ndarray, width: int, **options: object) -> torch.Tensor:
    arguments: dict = {"key": KEY, "std": 1.0, "truncated": False} | options
    out = torch.full((len(rows), width), float("nan"))
    normal_rows(out, rows, **arguments)
    return out


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("width", [1, 7, 33, 160])
@pytest.mark.parametrize("first_element", [0, 3])
def test_follows_the_definition(width: int, first_element: int, truncated: bool) -> None:
    rows = np.array([0, 1, 2**31 - 1, 2**31, 2**41 - 1])
    ours = filled(rows, width, first_element=first_element, std=0.02, truncated=truncated)
    for row, values in zip(rows.tolist(), ours.numpy(), strict=True):
        expected = normal_row_reference(row, width, key=KEY, first_element=first_element, std=0.02, truncated=truncated)
        np.testing.assert_allclose(values, expected, rtol=3e-7, atol=1e-15)


@pytest.mark.parametrize("truncated", [False, True])
def test_moments_and_quantiles(truncated: bool) -> None:
    """A million values: every quantile within 5 standard errors, and the second and fourth moment."""
    values = filled(np.arange(10_000), 100, truncated=truncated).flatten().double().sort().values
    count, normal = len(values), NormalDist()
    low = normal.cdf(-2) if truncated else 0.0
    for p in (1e-5, 1e-4, 0.001, 0.01, 0.0749, 0.0751, 0.3, 0.5, 0.7, 0.9249, 0.9251, 0.99, 0.9999):
        below = normal.inv_cdf(low + (1 - 2 * low) * p)
        found = torch.searchsorted(values, torch.tensor(below, dtype=torch.float64)).item() / count
        assert abs(found - p) < 5 * (p * (1 - p) / count) ** 0.5
    second, fourth = (0.7737413, 1.4161884) if truncated else (1.0, 3.0)
    assert abs(values.mean().item()) < 5e-3
    assert values.pow(2).mean().item() == pytest.approx(second, abs=8e-3)
    assert values.pow(4).mean().item() == pytest.approx(fourth, abs=5e-2)
    if truncated:
        assert values.abs().max().item() <= 2 * (1 + 3e-7)
    else:
        assert 4.5 < values.abs().max().item() < 6.4


def test_elements_rows_and_keys_are_independent() -> None:
    rows = np.arange(500)
    values = torch.cat([filled(rows, 64, key=key) for key in (1, 2)], dim=1).double()
    by_element = torch.corrcoef(values.T) - torch.eye(128, dtype=torch.float64)
    by_row = torch.corrcoef(values) - torch.eye(500, dtype=torch.float64)
    assert by_element.abs().max() < 5.5 / 500**0.5
    assert by_row.abs().max() < 6 / 128**0.5
    assert (
        len(values.unique()) > 63_900
    )  # fp32 repeats a few of 64,000 values; a repeated row or column would repeat 64


@pytest.mark.parametrize("truncated", [False, True])
def test_order_threads_and_parts_change_nothing(truncated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.permutation(10**6)[:301]
    whole = filled(rows, 33, truncated=truncated)
    shuffle = rng.permutation(301)
    assert torch.equal(filled(rows[shuffle], 33, truncated=truncated), whole[torch.from_numpy(shuffle)])
    monkeypatch.setattr(op, "_GRAIN_VALUES", 33)
    try:
        for threads in (1, 3):
            set_threads(threads)
            assert torch.equal(filled(rows, 33, truncated=truncated), whole)
    finally:
        set_threads(0)
    table = torch.full((301, 40), float("nan"))
    for start, stop in [(0, 1), (1, 14), (14, 32), (32, 33)]:  # columns of a wider table, odd starts included
        part = table[:, 5 + start : 5 + stop]
        normal_rows(part, rows, key=KEY, first_element=start, std=1.0, truncated=truncated)
    assert torch.equal(table[:, 5:38], whole)
    assert table[:, :5].isnan().all() and table[:, 38:].isnan().all()


def test_scale_and_zero() -> None:
    rows = np.arange(20)
    assert torch.equal(filled(rows, 9, std=0.25), filled(rows, 9) * 0.25)
    assert not filled(rows, 9, std=0.0).any()


@pytest.mark.parametrize(("count", "width"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_fill(count: int, width: int) -> None:
    assert filled(np.arange(count), width).shape == (count, width)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(3, 4, dtype=torch.float64), "for 3 rows"),
        (torch.empty(4, 4), "for 3 rows"),
        (torch.empty(12), "for 3 rows"),
        (torch.empty(4, 3).T, "strides"),
        (torch.empty(1, 4).expand(3, 4), "strides"),
    ],
)
def test_misfits_are_refused(out: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normal_rows(out, np.arange(3), key=1, std=1.0)
