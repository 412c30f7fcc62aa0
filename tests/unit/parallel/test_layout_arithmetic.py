"""Layout arithmetic over every layout of worlds up to 64 ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megamem.errors import ConfigError
from megamem.parallel.config import ParallelConfig
from megamem.parallel.layout import Layout, owner_range, rows_per_owner, stage_layers


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _layouts(largest_world: int = 64) -> Iterator[Layout]:
    for world in range(1, largest_world + 1):
        for tp in _divisors(world):
            for pp in _divisors(world // tp):
                for ep in _divisors(world // tp // pp):
                    yield Layout(world_size=world, tp=tp, pp=pp, ep=ep)


def test_coordinates_and_ranks_are_inverse() -> None:
    for layout in _layouts():
        places = [layout.coordinates(rank) for rank in range(layout.world_size)]
        assert [layout.rank(tp=c.tp, dp=c.dp, pp=c.pp) for c in places] == list(range(layout.world_size))
        assert [c.rank for c in places] == list(range(layout.world_size))
        assert {(c.tp, c.dp, c.pp) for c in places} == {
            (tp, dp, pp) for tp in range(layout.tp) for dp in range(layout.dp) for pp in range(layout.pp)
        }


def test_consecutive_data_parallel_ranks_hold_one_copy_of_the_experts() -> None:
    for layout in _layouts():
        for copy in range(layout.dp // layout.ep):
            holders = [layout.coordinates(layout.rank(dp=copy * layout.ep + i)) for i in range(layout.ep)]
            assert [c.ep for c in holders] == list(range(layout.ep))


def test_memory_groups_partition_the_world_by_stage() -> None:
    for layout in _layouts():
        groups = [layout.memory_group(stage) for stage in range(layout.pp)]
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(layout.world_size))
        for stage, ranks in enumerate(groups):
            assert len(ranks) == layout.stage_size
            assert {layout.coordinates(rank).pp for rank in ranks} == {stage}


@pytest.mark.parametrize("owners", range(1, 17))
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 97, 1000])
def test_owner_ranges_cover_every_row_once_and_agree_with_the_division(rows: int, owners: int) -> None:
    ranges = [owner_range(rows, owners, owner) for owner in range(owners)]
    assert [row for owned in ranges for row in owned] == list(range(rows))
    size = rows_per_owner(rows, owners)
    assert all(row // size == owner for owner, owned in enumerate(ranges) for row in owned)
    assert max(len(owned) for owned in ranges) == size


def test_stages_hold_every_layer_once() -> None:
    for stages in range(1, 9):
        layers = [layer for stage in range(stages) for layer in stage_layers(8 * stages, stages, stage)]
        assert layers == list(range(8 * stages))
    with pytest.raises(ConfigError, match=r"model\.num_layers=5 .*parallel\.pipeline_model_parallel_size=2"):
        stage_layers(5, 2, 0)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (
            ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            6,
            "start a multiple of 4 ranks",
        ),
        (ParallelConfig(expert_model_parallel_size=3), 4, "expert_model_parallel_size=3 does not divide the 4"),
    ],
)
def test_a_layout_that_does_not_fit_the_world_is_refused(config: ParallelConfig, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout.from_config(config, world_size)


def test_the_rest_of_the_world_is_data_parallel() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, expert_model_parallel_size=2)
    layout = Layout.from_config(config, 32)
    assert (layout.dp, layout.stage_size) == (4, 8)
