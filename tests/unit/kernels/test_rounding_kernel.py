"""Rounding of rows: compiled and Triton against exact arithmetic, and what the rule promises."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import pytest
import torch
from torch import Tensor

from megamem_kernels.formats import FormatName, bits_of, row_fields
from megamem_kernels.parallel import set_threads
from megamem_kernels.rounding import quantize_rows
from megamem_kernels.rounding.reference import quantize_rows as reference
from megamem_kernels.rounding.reference import random_lanes
from megamem_kernels.rounding.triton import quantize_rows_triton
from megamem_kernels.row_gather import dequantize_rows

FORMATS: list[FormatName] = ["bf16", "fp8"]
KEY, STEP = 2**64 - 5, 2**31 + 7


def poisoned(name: FormatName, count: int, width: int) -> dict[str, Tensor]:
    """Fields full of NaN codes."""
    fields = {field.name: field.allocate(count) for field in row_fields(name, width)}
    for tensor in fields.values():
        tensor.view(torch.uint8).fill_(0xFF)
    return fields


def hard_values(count: int, width: int) -> Tensor:
    """Rows of every magnitude of fp32, with zeros of both signs, ties, subnormal numbers and the ends of the range."""
    generator = torch.Generator().manual_seed(count * 1000 + width)
    values = torch.randn(count, width, generator=generator) * torch.exp2(
        torch.randint(-150, 128, (count, 1), generator=generator)
    )
    values.clamp_(-3.4e38, 3.4e38)
    flat = values.view(-1)
    edges = [
        0.0,
        -0.0,
        1.00390625,
        1.01171875,
        448.0,
        464.0,
        3.4028235e38,
        -3.4028235e38,
        1e-45,
        -1e-40,
        2.0**-127,
        17.0,
        0.0137,
    ]
    flat[: len(edges)] = torch.tensor(edges)[: flat.numel()]
    return values


def row_numbers(count: int) -> Tensor:
    return torch.arange(count) * 3 + torch.tensor([0, 2**31 - 1, 2**33 + 5])[torch.arange(count) % 3]


def decoded(name: FormatName, fields: dict[str, Tensor], width: int) -> Tensor:
    return dequantize_rows(fields, torch.full((len(fields["rows"]), width), torch.nan))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", ["fp32", *FORMATS])
@pytest.mark.parametrize("width", [1, 7, 33, 160])
@pytest.mark.parametrize("count", [0, 1, 37])
def test_equals_exact_arithmetic_bit_for_bit(count: int, width: int, name: FormatName, stochastic: bool) -> None:
    values = hard_values(count, width)
    ids = row_numbers(count) if stochastic else None
    ours, exact, triton = (poisoned(name, count, width) for _ in range(3))
    quantize_rows(values, ours, key=KEY, step=STEP, ids=ids)
    reference(values, exact, key=KEY, step=STEP, ids=ids)
    if name != "fp32":
        with np.errstate(over="ignore"):
            quantize_rows_triton(values, triton, key=KEY, step=STEP, ids=ids)
    for field in ours:
        np.testing.assert_array_equal(bits_of(ours[field]), bits_of(exact[field]))
        if name != "fp32":
            np.testing.assert_array_equal(bits_of(triton[field]), bits_of(exact[field]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_finite_values_stay_finite_and_others_are_what_is_promised(name: FormatName, stochastic: bool) -> None:
    values = torch.tensor([[3.4028235e38, -3.4028235e38, 3.39e38, 1e-45]]).repeat(500, 9)
    fields = poisoned(name, 500, 36)
    quantize_rows(values, fields, ids=torch.arange(500) if stochastic else None)
    assert decoded(name, fields, 36).isfinite().all()
    special = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]]).repeat(500, 9)
    quantize_rows(special, fields, ids=torch.arange(500) if stochastic else None)
    result = decoded(name, fields, 36)
    assert result[:, 2::4].isnan().all()
    assert not result[:, 3::4].isnan().any()
    largest = torch.inf if name == "bf16" else 448 * 2.0**119
    assert (result[:, 0::4] == largest).all()
    assert (result[:, 1::4] == -largest).all()


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_unbiased_between_the_two_neighbours(name: FormatName) -> None:
    draws = 20_000
    row = torch.tensor([1.0, 1.001, -1.003, 0.7, 0.3, 1e-3, 2.0, -0.011, 3.1e-5])
    fields = poisoned(name, draws, len(row))
    quantize_rows(row.repeat(draws, 1), fields, key=3, step=1, ids=torch.arange(draws))
    result = decoded(name, fields, len(row)).double()
    below, above = result.min(dim=0).values, result.max(dim=0).values
    exact = row.double()
    spacing = above - below
    assert ((below <= exact) & (exact <= above)).all()
    for column, (low, high) in enumerate(zip(below, above, strict=True)):
        assert ((result[:, column] == low) | (result[:, column] == high)).all()
    assert (spacing[[0, 6]] == 0).all(), "values that the format holds never change"
    assert (spacing[[1, 2, 3, 4, 5, 7, 8]] > 0).all()
    up = torch.where(spacing > 0, (exact - below) / spacing, 0)
    error = 5 * (up * (1 - up) / draws).sqrt() * spacing + spacing * 2**-16
    assert ((result.mean(dim=0) - exact).abs() <= error).all()


def test_random_bits_differ_by_key_step_row_and_element_and_by_nothing_else() -> None:
    values = torch.rand(64, 40) + 1
    ids = row_numbers(64)

    def rounded(rows: slice, key: int, step: int) -> np.ndarray:
        fields = poisoned("bf16", len(values[rows]), 40)
        quantize_rows(values[rows], fields, key=key, step=step, ids=ids[rows])
        return bits_of(fields["rows"])

    whole = rounded(slice(None), 9, 4)
    np.testing.assert_array_equal(rounded(slice(20, 41), 9, 4), whole[20:41])
    assert (rounded(slice(None), 10, 4) != whole).mean() > 0.1
    assert (rounded(slice(None), 9, 5) != whole).mean() > 0.1
    lanes = random_lanes(9, 4, ids.numpy(), 40)
    assert len(np.unique(lanes)) > 0.9 * 65536 * (1 - np.exp(-lanes.size / 65536))


@pytest.mark.parametrize("name", FORMATS)
def test_threads_change_nothing(name: FormatName) -> None:
    values, ids = torch.randn(3001, 129), torch.arange(3001)
    results = []
    for threads in (1, 3):
        set_threads(threads)
        try:
            fields = poisoned(name, 3001, 129)
            quantize_rows(values, fields, key=1, step=2, ids=ids)
        finally:
            set_threads(0)
        results.append(fields)
    for field in results[0]:
        np.testing.assert_array_equal(bits_of(results[0][field]), bits_of(results[1][field]))


@pytest.mark.parametrize("ids", [None, torch.arange(300)])
def test_fp8_rows_keep_their_values_when_they_are_stored_again(ids: Tensor | None) -> None:
    stored, again, third = (poisoned("fp8", 300, 72) for _ in range(3))
    quantize_rows(torch.randn(300, 72), stored, key=1, step=1, ids=torch.arange(300))
    quantize_rows(decoded("fp8", stored, 72), again, key=1, step=2, ids=ids)
    assert torch.equal(decoded("fp8", stored, 72), decoded("fp8", again, 72))
    quantize_rows(decoded("fp8", again, 72), third, key=1, step=3, ids=ids)
    for field in again:
        np.testing.assert_array_equal(bits_of(again[field]), bits_of(third[field]))


def test_scale_is_the_smallest_power_of_two_that_fits() -> None:
    largest = torch.tensor([448.0, 448.1, 449, 896, 1.75, 1.76, 0.0, 3.4e38, 2.0**-127, 1e-45])
    fields = poisoned("fp8", len(largest), 1)
    quantize_rows(largest[:, None], fields)
    assert fields["scales"][:, 0].tolist() == [127, 128, 128, 128, 119, 120, 127, 246, 7, 7]


def test_wrong_arguments_are_refused() -> None:
    fields = poisoned("fp8", 4, 40)
    values = torch.zeros(4, 40)
    with pytest.raises(ValueError, match="values"):
        quantize_rows(values.double(), fields)
    with pytest.raises(ValueError, match="rows"):
        quantize_rows(torch.zeros(5, 40), fields)
    with pytest.raises(ValueError, match="scales"):
        quantize_rows(values, {**fields, "scales": torch.zeros(4, 1, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="ids"):
        quantize_rows(values, fields, ids=torch.arange(4, dtype=torch.int32))
