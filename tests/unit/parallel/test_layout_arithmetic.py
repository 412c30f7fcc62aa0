"""Layout arithmetic over every layout of worlds up to 64 ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megamem.errors import ConfigError
from megamem.parallel.config import ParallelConfig
from megamem.parallel.layout import Layout, owner_range, rows_per_owner


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _layouts(largest_world: int = 64) -> Iterator[Layout]:
    for world in range(1, largest_world + 1):
        for tp in _divisors(world):
            for pp in _divisors(world // tp):
                for cp in _divisors(world // tp // pp):
                    for ep in _divisors(world // tp // pp):
                        yield Layout(world_size=world, tp=tp, pp=pp, ep=ep, cp=cp)


def test_coordinates_and_ranks_are_inverse() -> None:
    for layout in _layouts():
        places = [layout.coordinates(rank) for rank in range(layout.world_size)]
        assert [layout.rank(tp=c.tp, cp=c.cp, dp=c.dp, pp=c.pp) for c in places] == list(range(layout.world_size))
        assert [c.rank for c in places] == list(range(layout.world_size))
        assert {(c.slice, c.dp, c.pp) for c in places} == {
            (part, dp, pp) for part in range(layout.slices) for dp in range(layout.dp) for pp in range(layout.pp)
        }
        assert all(c.slice == c.cp * layout.tp + c.tp for c in places)


def test_consecutive_replicas_hold_one_copy_of_the_experts() -> None:
    for layout in _layouts(32):
        replicas = [r for r in layout.memory_group(0) if layout.coordinates(r).tp == 0]
        for copy in range(len(replicas) // layout.ep):
            holders = replicas[copy * layout.ep : (copy + 1) * layout.ep]
            assert [layout.coordinates(rank).ep for rank in holders] == list(range(layout.ep))


def test_experts_are_spread_over_the_ranks_of_a_stage_whatever_its_tensor_parallelism() -> None:
    layout = Layout(8, tp=4, ep=4, etp=1)
    assert [(c.ep, c.etp) for c in map(layout.coordinates, range(8))] == [(i % 4, 0) for i in range(8)]
    layout = Layout(8, tp=1, ep=2, etp=2)
    assert [(c.ep, c.etp) for c in map(layout.coordinates, range(4))] == [(0, 0), (0, 1), (1, 0), (1, 1)]


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


@pytest.mark.parametrize("vpp", [1, 2, 4])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (4, 0), (0, 12), (4, 12)])
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_stages_hold_every_layer_once_and_chunks_follow_each_other(
    stages: int, vpp: int, first: int, last: int
) -> None:
    layout = Layout(stages, pp=stages, vpp=vpp, first_stage_layers=first, last_stage_layers=last)
    layers = (first or 8) + (last or 8) + 8 * (stages - 2)
    in_order = [layout.chunk_layers(layers, stage, chunk) for chunk in range(vpp) for stage in range(stages)]
    assert [layer for chunk in in_order for layer in chunk] == list(range(layers))
    assert sorted(layer for stage in range(stages) for layer in layout.stage_layers(layers, stage)) == list(
        range(layers)
    )
    assert len(layout.stage_layers(layers, 0)) == (first or 8)
    assert len(layout.stage_layers(layers, stages - 1)) == (last or 8)


@pytest.mark.parametrize(
    ("layout", "layers", "message"),
    [
        (Layout(2, pp=2), 5, r"model\.num_layers=5 .*parallel\.pipeline_model_parallel_size=2"),
        (Layout(4, pp=4), 0, r"model\.num_layers=0"),
        (Layout(4, pp=4, first_stage_layers=1), 9, r"num_layers_in_first_pipeline_stage=1 .* the same number each"),
        (Layout(2, pp=2, first_stage_layers=1, last_stage_layers=2), 4, "num_layers_in_last_pipeline_stage=2"),
        (Layout(4, pp=4, first_stage_layers=8), 8, "at least 1"),
        (Layout(2, pp=2, vpp=3), 8, "stage 0 has 4 .*virtual_pipeline_model_parallel_size=3"),
        (Layout(2, pp=2, vpp=2, first_stage_layers=2), 5, "stage 1 has 3"),
    ],
)
def test_layers_that_cannot_be_dealt_out_are_refused(layout: Layout, layers: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout.stage_layers(layers, 0)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (
            ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            6,
            "start a multiple of 4 ranks",
        ),
        (ParallelConfig(expert_model_parallel_size=3), 4, "expert_model_parallel_size=3 does not divide the 4"),
        (ParallelConfig(context_parallel_size=2), 3, "context_parallel_size=2; start a multiple of 2 ranks"),
        (
            ParallelConfig(expert_model_parallel_size=2, expert_tensor_parallel_size=2),
            2,
            "expert_tensor_parallel_size=2 does not divide the 2 ranks of a pipeline stage",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_world_is_refused(config: ParallelConfig, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout.from_config(config, world_size)


def test_the_rest_of_the_world_is_data_parallel() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, expert_model_parallel_size=2)
    layout = Layout.from_config(config, 32)
    assert (layout.dp, layout.stage_size) == (4, 8)
