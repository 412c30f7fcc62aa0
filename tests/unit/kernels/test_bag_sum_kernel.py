from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megamem_kernels.bag_sum import cpu, reference, weighted_bag
from megamem_kernels.parallel import set_threads

SHAPES = [(3, 1, 1, 1), (5, 4, 3, 7), (40, 33, 5, 33), (300, 61, 32, 160), (4, 0, 3, 5), (4, 3, 0, 5)]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "_GRAIN", 1)
    yield
    set_threads(0)


def problem(unique: int, bags: int, size: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, index (half of it one row), weights, and a gradient of the result."""
    generator = torch.Generator().manual_seed(unique + width)
    index = torch.randint(0, unique, (bags, size), generator=generator)
    index.view(-1)[::2] = unique // 2
    return (
        torch.randn(unique, width, generator=generator).to(dtype),
        index,
        torch.randn(bags, size, generator=generator),
        torch.randn(bags, width, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_definition(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, index, weights, upstream = problem(*shape, dtype)
    expected_rows, expected_weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = reference.weighted_bag(expected_rows, index, expected_weights)
    expected.backward(upstream)
    results = []
    for threads in (1, 3):
        set_threads(threads)
        mine, factors = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        result = weighted_bag(mine, index, factors)
        result.backward(upstream)
        assert mine.grad is not None and factors.grad is not None and result.dtype == dtype
        results.append((result.detach(), mine.grad, factors.grad))
    wanted = (expected.detach(), expected_rows.grad, expected_weights.grad)
    torch.testing.assert_close(results[0], wanted, **TOLERANCE[dtype])
    assert all(one.equal(three) for one, three in zip(*results, strict=True))


def test_equals_embedding_bag() -> None:
    rows, index, weights, upstream = problem(40, 33, 5, 33, torch.float32)
    mine, factors = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    peer, peer_factors = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    result = weighted_bag(mine, index, factors)
    expected = torch.nn.functional.embedding_bag(index, peer, mode="sum", per_sample_weights=peer_factors)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    (result * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close((mine.grad, factors.grad), (peer.grad, peer_factors.grad), rtol=1e-5, atol=1e-5)


def test_gradients_of_micro_batches_accumulate_in_place() -> None:
    rows, index, weights, upstream = problem(40, 33, 5, 33, torch.float32)
    whole, parts = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    parts.grad = torch.zeros_like(rows)
    buffer = parts.grad.data_ptr()
    weighted_bag(whole, index, weights).backward(upstream)
    for part in (slice(0, 20), slice(20, 33)):
        weighted_bag(parts, index[part], weights[part]).backward(upstream[part])
    assert whole.grad is not None and parts.grad.equal(whole.grad)
    assert parts.grad.data_ptr() == buffer


def test_memory_for_the_gradient_is_overwritten_first_and_added_to_then() -> None:
    rows, index, weights, upstream = problem(40, 33, 5, 33, torch.float32)
    fresh, persistent = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    memory = torch.full_like(rows, torch.nan)
    for _ in range(2):
        weighted_bag(fresh, index, weights).backward(upstream)
        weighted_bag(persistent, index, weights, gradient=memory).backward(upstream)
    assert persistent.grad is memory and fresh.grad is not None and memory.equal(fresh.grad)
    with pytest.raises(ValueError, match="gradient"):
        weighted_bag(persistent, index, weights, gradient=memory[1:])


def test_a_gradient_that_nobody_wants_is_not_made() -> None:
    rows, index, weights, upstream = problem(5, 4, 3, 7, torch.float32)
    alone = weights.clone().requires_grad_()
    weighted_bag(rows, index, alone).backward(upstream)
    both, mine = weights.clone().requires_grad_(), rows.clone().requires_grad_()
    weighted_bag(mine, index, both).backward(upstream)
    assert rows.grad is None and alone.grad is not None and alone.grad.equal(both.grad)
    assert not weighted_bag(rows, index, weights).requires_grad


def test_weights_of_another_dtype_get_their_own_gradient() -> None:
    rows, index, weights, upstream = problem(5, 4, 3, 7, torch.float32)
    half, full = weights.bfloat16().requires_grad_(), weights.bfloat16().float().requires_grad_()
    weighted_bag(rows, index, half).backward(upstream)
    weighted_bag(rows, index, full).backward(upstream)
    assert half.grad is not None and full.grad is not None and half.grad.equal(full.grad.bfloat16())


@pytest.mark.parametrize("wrong", [-1, 5, 2**31, 2**40])
def test_an_index_out_of_range_is_refused(wrong: int) -> None:
    rows, index, weights, _ = problem(5, 4, 3, 7, torch.float32)
    index[2, 1] = wrong
    with pytest.raises(ValueError, match=rf"index\[2, 1\] is {wrong}, not in \[0, 5\)"):
        weighted_bag(rows, index, weights)


def test_arguments_that_do_not_fit_are_refused() -> None:
    rows, index, weights, _ = problem(5, 4, 3, 7, torch.float32)
    with pytest.raises(ValueError, match=r"rows are torch\.float64"):
        weighted_bag(rows.double(), index, weights)
    with pytest.raises(ValueError, match="rows are"):
        weighted_bag(rows.T, index, weights)
    with pytest.raises(ValueError, match=r"index is torch\.int32"):
        weighted_bag(rows, index.int(), weights)
    with pytest.raises(ValueError, match="weights are"):
        weighted_bag(rows, index, weights[:, :2])
    with pytest.raises(ValueError, match="leaf"):
        weighted_bag(rows.requires_grad_() * 1, index, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 4, 3, 7), (6, 5, 4, 1030), (4, 3, 0, 5)])
def test_triton_equals_the_cpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from megamem_kernels.bag_sum import triton

    rows, index, weights, upstream = problem(*shape, dtype)
    mine, factors = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = weighted_bag(mine, index, factors)
    expected.backward(upstream)
    out = torch.full_like(expected, torch.nan, requires_grad=False)
    triton.forward(rows, index, weights, out)
    torch.testing.assert_close(out, expected.detach(), **TOLERANCE[dtype])
    row_gradient, weight_gradient = torch.full_like(rows, torch.nan), torch.full_like(weights, torch.nan)
    triton.backward(upstream, rows, index, weights, row_gradient, False, weight_gradient)
    torch.testing.assert_close((row_gradient, weight_gradient), (mine.grad, factors.grad), **TOLERANCE[dtype])
    triton.backward(upstream, rows, index, weights, row_gradient, True, None)
    assert mine.grad is not None
    torch.testing.assert_close(row_gradient, 2 * mine.grad, rtol=2**-6, atol=2**-6)
