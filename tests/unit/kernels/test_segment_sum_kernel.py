from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megamem_kernels.parallel import set_threads
from megamem_kernels.segment_sum import reference, segment_sum
from megamem_kernels.segment_sum.cpu import Segments


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    set_threads(0)


def occurrences(count: int, width: int, segments: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values over twelve orders of magnitude, so that another order of additions shows; half of them in one segment."""
    generator = torch.Generator().manual_seed(count + width)
    values = torch.randn(count, width, generator=generator) * 10.0 ** (torch.arange(count) % 13 - 6)[:, None]
    segment = torch.randint(0, max(1, segments), (count,), generator=generator)
    segment[::2] = segments // 2
    return values.to(dtype), segment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "width", "segments"), [(0, 7, 3), (1, 1, 1), (997, 33, 60), (4001, 160, 29), (300, 1, 7)]
)
def test_equals_the_definition_bit_for_bit(count: int, width: int, segments: int, dtype: torch.dtype) -> None:
    values, segment = occurrences(count, width, segments, dtype)
    expected = reference.segment_sum(values, segment, segments)
    poisoned = torch.full((segments, width), torch.nan)
    for threads in (1, 3):
        set_threads(threads)
        assert torch.equal(segment_sum(values, segment, segments), expected)
        assert segment_sum(values, segment, segments, out=poisoned.clone()).equal(expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_accumulate_continues_the_sum(threads: int) -> None:
    set_threads(threads)
    values, segment = occurrences(2000, 33, 17, torch.float32)
    out = segment_sum(values[:1234], segment[:1234], 17)
    again = segment_sum(values[1234:], segment[1234:], 17, out=out, accumulate=True)
    assert again is out
    assert out.equal(segment_sum(values, segment, 17))


def test_nothing_but_segments() -> None:
    assert segment_sum(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 0).shape == (0, 5)
    assert segment_sum(torch.empty(4, 0), torch.zeros(4, dtype=torch.int64), 2).shape == (2, 0)


@pytest.mark.parametrize("wrong", [-1, 5, 2**31, 2**40])
def test_a_segment_out_of_range_is_refused(wrong: int) -> None:
    segment = torch.tensor([0, 4, wrong, 1])
    with pytest.raises(ValueError, match=rf"segment\[2\] is {wrong}, not in \[0, 5\)"):
        segment_sum(torch.ones(4, 2), segment, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"values": torch.ones(3, 2, dtype=torch.float64)},
        {"values": torch.ones(2, 3).T},
        {"segment": torch.zeros(3, dtype=torch.int32)},
        {"segment": torch.zeros(4, dtype=torch.int64)},
        {"out": torch.zeros(3, 2)},
        {"out": torch.zeros(2, 2, dtype=torch.bfloat16)},
        {"accumulate": True},
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict) -> None:
    fitting = {"values": torch.ones(3, 2), "segment": torch.zeros(3, dtype=torch.int64), "segments": 2}
    segment_sum(**fitting)
    with pytest.raises(ValueError, match=r"values|segment|out"):
        segment_sum(**(fitting | arguments))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_ranges_cover_every_segment_once(threads: int) -> None:
    set_threads(threads)
    segment = np.repeat(np.array([3, 3, 8], dtype=np.int64), [1, 4000, 7])
    calls: list[tuple[int, int]] = []
    Segments(segment, 40).for_ranges(lambda low, high: calls.append((low, high)), 64)
    assert sorted(k for low, high in calls for k in range(low, high)) == list(range(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "width", "segments"), [(0, 3, 2), (57, 1, 9), (40, 33, 6), (9, 1030, 4)])
def test_triton_equals_the_definition_bit_for_bit(count: int, width: int, segments: int, dtype: torch.dtype) -> None:
    from megamem_kernels.segment_sum import triton

    values, segment = occurrences(count, width, segments, dtype)
    out = torch.full((segments, width), torch.nan)
    triton.segment_sum(values, segment, out, False)
    assert out.equal(reference.segment_sum(values, segment, segments))
    triton.segment_sum(values, segment, out, True)
    twice = reference.segment_sum(values, segment, segments)
    assert out.equal(reference.segment_sum(values, segment, segments, out=twice, accumulate=True))
