"""megatron's groups against the pure layout, and megatron-core on machines without CUDA."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.memory.links import create_links
from megamem.parallel import cpu
from megamem.parallel.groups import destroy, init_distributed, initialize
from megamem.parallel.layout import Layout
from megamem.testing.distributed import run_distributed

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="megatron-core is left as it is on a CUDA machine")


def groups_of_all_layouts() -> list[dict[str, Any]]:
    """Every layout of four ranks, one after the other in the same processes."""
    reports = []
    for tp, pp, ep in [
        (1, 1, 1),
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
        (1, 1, 4),
        (2, 2, 1),
        (2, 1, 2),
        (1, 2, 2),
        (1, 4, 1),
    ]:
        layout = Layout(world_size=4, tp=tp, pp=pp, ep=ep)
        groups = initialize(layout, seed=5)  # raises where megatron and the layout disagree
        members = {
            name: dist.get_process_group_ranks(getattr(groups, name))
            for name in ("world", "tp", "dp", "pp", "ep", "expert_dp")
        }
        links = create_links(layout, MemoryConfig(), groups.device)
        members["memory"] = dist.get_process_group_ranks(links.group)
        total = torch.tensor([float(groups.coordinates.rank)])
        dist.all_reduce(total, group=links.group)
        reports.append(
            {
                "layout": layout,
                "place": groups.coordinates,
                "members": members,
                "memory_sum": total.item(),
                "memory_backend": dist.get_backend(links.group),
                "edges": (groups.is_first_stage, groups.is_last_stage),
                "embedding": groups.embedding and dist.get_process_group_ranks(groups.embedding),
            }
        )
        destroy()
    return reports


def test_groups_hold_the_ranks_that_the_layout_says() -> None:
    for reports in run_distributed(groups_of_all_layouts, 4):
        for report in reports:
            layout, place, members = report["layout"], report["place"], report["members"]
            assert members["world"] == [0, 1, 2, 3]
            assert members["tp"] == [layout.rank(tp=i, dp=place.dp, pp=place.pp) for i in range(layout.tp)]
            assert members["dp"] == [layout.rank(tp=place.tp, dp=i, pp=place.pp) for i in range(layout.dp)]
            assert members["pp"] == [layout.rank(tp=place.tp, dp=place.dp, pp=i) for i in range(layout.pp)]
            same_expert = [d for d in range(layout.dp) if d % layout.ep == place.ep]
            assert members["expert_dp"] == [layout.rank(tp=place.tp, dp=d, pp=place.pp) for d in same_expert]
            assert len(members["ep"]) == layout.ep and place.rank in members["ep"]
            assert members["memory"] == layout.memory_group(place.pp)
            assert report["memory_sum"] == sum(members["memory"])
            assert report["memory_backend"] == "gloo"
            assert report["edges"] == (place.pp == 0, place.pp == layout.pp - 1)
            stages = {0, layout.pp - 1}
            ends = [layout.rank(tp=place.tp, dp=place.dp, pp=i) for i in sorted(stages)]
            assert report["embedding"] == (ends if place.pp in stages else None)


def one_process_without_environment() -> tuple[int, int, float, str]:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name)
    init_distributed()
    init_distributed()  # does nothing the second time
    groups = initialize(Layout(), seed=1)
    assert create_links(Layout(), MemoryConfig(), groups.device).group is None
    total = torch.ones(1)
    dist.all_reduce(total)
    return dist.get_world_size(), parallel_state.get_data_parallel_world_size(), total.item(), groups.device.type


def test_one_process_needs_no_environment() -> None:
    world, dp, total, device = run_distributed(one_process_without_environment, 1)[0]
    assert (world, dp, total) == (1, 1, 1.0)
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")


def errors_of_users() -> list[str]:
    messages = []
    try:
        initialize(Layout(world_size=2), seed=1)
    except ConfigError as error:
        messages.append(str(error))
    dist.destroy_process_group()
    try:
        init_distributed()  # run_distributed sets RANK and WORLD_SIZE, but no address
    except ConfigError as error:
        messages.append(str(error))
    init_distributed_alone()
    return messages


def init_distributed_alone() -> None:
    """Leave a default group behind, as run_distributed expects."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_wrong_world_or_half_an_environment_is_explained() -> None:
    wrong_world, no_address = run_distributed(errors_of_users, 1)[0]
    assert "for 2 ranks but 1 are running" in wrong_world
    assert "MASTER_ADDR and MASTER_PORT" in no_address and "torchrun" in no_address


def recompute_with_dropout() -> dict[str, bool]:
    """A recomputed block with dropout in the tracked random state has the gradients of the plain block."""
    initialize(Layout(), seed=11)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.ones(4, 6)

    def block(value: torch.Tensor) -> torch.Tensor:
        with tracker.fork():
            return torch.nn.functional.dropout(value @ weight, 0.5)

    start, tracked = torch.get_rng_state(), tracker.get_states()
    plain = block(x.clone().requires_grad_())
    (expected,) = torch.autograd.grad(plain.square().sum(), weight)
    after = torch.get_rng_state()
    tracker.set_states(tracked)
    again = tensor_parallel.checkpoint(block, False, x.clone().requires_grad_())
    again.square().sum().backward()
    return {
        "outputs": torch.equal(plain, again),
        "gradients": torch.equal(expected, weight.grad),  # type: ignore[arg-type]
        "dropped": bool((plain == 0).any()),
        "outer state untouched": torch.equal(start, after),
    }


@without_cuda
def test_recompute_draws_the_same_dropout() -> None:
    report = run_distributed(recompute_with_dropout, 1)[0]
    assert all(report.values()), report


UNEVEN = [3, 0, 2]


def uneven_gather_and_scatter() -> tuple[list[float], list[float]]:
    groups = initialize(Layout(world_size=3, tp=3), seed=1)
    rank = groups.coordinates.rank
    rows = torch.full((UNEVEN[rank], 2), rank + 1.0, requires_grad=True)
    gathered = tensor_parallel.gather_from_sequence_parallel_region(rows, group=groups.tp, output_split_sizes=UNEVEN)
    (gathered * (rank + 1) * torch.arange(10.0).view(5, 2)).sum().backward()
    return gathered.flatten().tolist(), rows.grad.flatten().tolist()  # type: ignore[union-attr]


@without_cuda
def test_uneven_gather_works_on_gloo_and_its_gradient_sums_over_ranks() -> None:
    offset = 0
    for rank, (gathered, gradient) in enumerate(run_distributed(uneven_gather_and_scatter, 3)):
        assert gathered == [1.0] * 6 + [3.0] * 4
        count = 2 * UNEVEN[rank]
        assert gradient == [6.0 * i for i in range(offset, offset + count)]  # 1 + 2 + 3 = 6
        offset += count


@without_cuda
def test_enabling_twice_is_enabling_once() -> None:
    assert cpu.enable()
    current_device, factory = torch.cuda.current_device, torch.cuda.Stream
    assert cpu.enable()
    assert torch.cuda.current_device is current_device and torch.cuda.Stream is factory
    assert torch.cuda.current_device() == torch.device("cpu")
