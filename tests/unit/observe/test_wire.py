"""What a rank is said to send, and that counting leaves torch as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megamem.observe.wire import WIRES, WireCounter, sent_bytes


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("all_reduce", 150),
        ("all_gather", 300),
        ("reduce_scatter", 75),
        ("all_to_all", 75),
        ("reduce", 75),
        ("send", 100),
    ],
)
def test_bytes_of_four_ranks(operation: str, expected: float) -> None:
    assert sent_bytes(operation, 100, 4) == expected
    assert sent_bytes(operation, 100, 1) == 0


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    for size in (2, 3, 8):
        parts = sent_bytes("reduce_scatter", 240, size) + sent_bytes("all_gather", 240 / size, size)
        assert sent_bytes("all_reduce", 240, size) == pytest.approx(parts)


def test_a_process_alone_sends_nothing(alone: None) -> None:
    methods = dict(vars(dist.ProcessGroup))
    counter = WireCounter({})
    with counter.counting():
        assert vars(dist.ProcessGroup)["allreduce"] is not methods["allreduce"]
        dist.all_reduce(torch.ones(3))
    assert dict(vars(dist.ProcessGroup)) == methods
    dist.all_reduce(torch.ones(3))  # still bound to its group
    assert counter.take() == {}


def test_methods_come_back_after_an_error(alone: None) -> None:
    before = vars(dist.ProcessGroup)["broadcast"]
    with pytest.raises(KeyError), WireCounter({}).counting():
        raise KeyError
    assert vars(dist.ProcessGroup)["broadcast"] is before
    assert len(set(WIRES)) == len(WIRES)
