from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamem.memory.config import StorageConfig
from megamem.memory.exchange import Exchange, NodeLayout
from megamem.memory.exchange.nodes import create_node_layout, equal_nodes, hosts_of_world
from megamem.memory.placement import Placement, PlacementName
from megamem.memory.plan import FetchPlan, plan_stream
from megamem.memory.stats import StepStats
from megamem.memory.table import OwnedTable
from megamem.testing.distributed import run_distributed
from megamem.testing.streams import HashedStream
from megamem_kernels.row_gather import dequantize_rows

# 3 rows on 4 ranks leave the last owner without any; 1 row on 4 ranks leaves three of them.
STREAMS = [
    HashedStream("a", 101, (33, 1)),
    HashedStream("b", 3, (5,)),
    HashedStream("c", 1, (2,)),
    HashedStream("d", 67, (8,)),
]
FORMATS = {"a.0": "fp8", "a.1": "bf16", "b.0": "bf16", "c.0": "fp32", "d.0": "fp32"}
Working = dict[str, torch.Tensor]


def make_tables(placement: PlacementName, owners: int, owner: int) -> dict[str, OwnedTable]:
    return {
        spec.name: OwnedTable.create(
            spec,
            owners=owners,
            owner=owner,
            seed=5,
            placement=Placement(placement, stream.rows),
            storage=StorageConfig(format=FORMATS[spec.name]),
        )
        for stream in STREAMS
        for spec in stream.tables
    }


def make_plan(step: int, rank: int, placement: PlacementName) -> FetchPlan:
    """Very uneven: rank 1 wants nothing of even steps, rank 0 many rows of most."""
    rng = np.random.default_rng([step, rank])
    plans = {}
    for stream in STREAMS:
        n = 0 if (rank == 1 and step % 2 == 0) else (90, 7, 30, 1)[rank]
        addresses = [rng.integers(0, stream.rows, (1, n, 1)) for _ in range(2)]
        plans[stream.name] = plan_stream(stream.name, Placement(placement, stream.rows), addresses, size())
    return FetchPlan(step=step, train=True, micro_batches=2, streams=plans)


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def poisoned(plan: FetchPlan) -> Working:
    return {
        spec.name: torch.full((len(plan.streams[stream.name].ids), spec.width), float("nan"))
        for stream in STREAMS
        for spec in stream.tables
    }


def decoded(table: OwnedTable) -> torch.Tensor:
    raw = table.read(table.start, table.stop)
    fields = {field.name: raw[field.name] for field in table.rows.fields}
    return dequantize_rows(fields, torch.empty(table.stop - table.start, table.spec.width))


def change(table: OwnedTable, local: np.ndarray, step: int) -> None:
    """Another value for some owned rows, a function of step and position alone."""
    raw = {name: rows for name, rows in table.read(table.start, table.stop).items() if not name.startswith("state.")}
    for i in local.tolist():
        shape = raw["rows"][i].shape
        values = torch.sin(torch.arange(shape.numel(), dtype=torch.float32) + step + table.start + i)
        raw["rows"][i] = values.view(shape).to(raw["rows"].dtype)
        if "scales" in raw:
            raw["scales"][i] = 120 + (step + table.start + i) % 9
    table.write(table.start, raw)


def gradients_of(plan: FetchPlan, of_rank: int) -> Working:
    """A function of rank and position alone; the table of stream ``d`` gets none on rank 0."""
    return {
        spec.name: torch.sin(
            torch.from_numpy(plan.streams[stream.name].ids)[:, None] * 0.37 + torch.arange(spec.width) + 10 * of_rank
        ).float()
        for stream in STREAMS
        for spec in stream.tables
        if not (spec.name == "d.0" and of_rank == 0)
    }


def summed(plans: Sequence[FetchPlan], stream: HashedStream, table: OwnedTable) -> tuple[np.ndarray, torch.Tensor]:
    """What an owner must get, with additions in rank order."""
    total = torch.zeros(stream.rows, table.spec.width)
    asked = np.zeros(stream.rows, dtype=bool)
    for of_rank, plan in enumerate(plans):
        ids = plan.streams[stream.name].ids
        asked[ids] = True
        if (gradient := gradients_of(plan, of_rank).get(table.spec.name)) is not None:
            total[ids] += gradient
    local = np.flatnonzero(asked[table.start : table.stop])
    return local, total[table.start : table.stop][local]


def run_steps(placement: PlacementName, verify: Any, nodes: NodeLayout | None) -> tuple[list[Any], StepStats]:
    """Two steps fetched ahead of an update, patched, compared with being fetched again, and returned. What each step brought."""
    group = dist.group.WORLD if size() > 1 else None
    tables = make_tables(placement, size(), rank())
    exchange = Exchange(STREAMS, tables, group, verify=verify, nodes=nodes)
    assert (exchange.rank, exchange.size) == (rank(), size())
    whole = {name: decoded(table) for name, table in make_tables(placement, 1, 0).items()}
    stats, brought = StepStats(), []
    plans = [make_plan(step, rank(), placement) for step in (1, 2, 3)]
    requests, rows = [], []
    for plan in plans:  # several steps are open at a time
        requests.append(exchange.request(plan, stats))
        rows.append(poisoned(plan))
        exchange.fetch(plan, requests[-1], rows[-1], stats)
    for plan, out in zip(plans, rows, strict=True):
        for stream in STREAMS:
            for spec in stream.tables:
                assert torch.equal(out[spec.name], whole[spec.name][torch.from_numpy(plan.streams[stream.name].ids)])
    assert stats.rows_received == sum(len(table) for out in rows for table in out.values())

    for update in (1, 2):
        for stream in STREAMS:
            owned = tables[stream.tables[0].name]
            local = np.flatnonzero(np.arange(owned.start, owned.stop) % (3 + update) == 0)
            for spec in stream.tables:
                change(tables[spec.name], local, update)
            for request in requests:
                request.mark(stream.name, local)
    dirty = torch.tensor([request.dirty for request in requests])
    patched = torch.tensor(
        [exchange.patch(plan, request, out, stats) for plan, request, out in zip(plans, requests, rows, strict=True)]
    )
    for plan, request, out in zip(plans, requests, rows, strict=True):
        assert request.dirty == 0
        again = poisoned(plan)
        exchange.fetch(plan, exchange.request(plan, stats), again, stats)
        assert all(torch.equal(out[name], again[name]) for name in out)
        assert exchange.patch(plan, request, out, stats) == 0
    if group is not None and nodes is None:
        dist.all_reduce(dirty)
        dist.all_reduce(total := patched.clone())
        assert torch.equal(dirty, total)
    assert stats.patched_rows == 0 and int(patched.sum()) == sum(
        int(np.isin(plan.streams[stream.name].ids, changed_positions(stream, placement)).sum()) * len(stream.tables)
        for plan in plans
        for stream in STREAMS
    )

    for plan, request, out in zip(plans, requests, rows, strict=True):
        everyone = [make_plan(plan.step, other, placement) for other in range(size())]
        returned = exchange.return_gradients(plan, request, gradients_of(plan, rank()), stats)
        kept = {name: sums.clone() for name, (_, sums) in returned.items()}
        request.mark("a", np.arange(5))
        exchange.patch(plan, request, out, stats)
        exchange.fetch(plan, exchange.request(plan, stats), out, stats)  # sums stay until gradients are returned again
        for stream in STREAMS:
            for spec in stream.tables:
                expected_rows, expected = summed(everyone, stream, tables[spec.name])
                local, sums = returned[spec.name]
                assert np.array_equal(local, expected_rows) and torch.equal(sums, kept[spec.name])
                if nodes is None:
                    assert torch.equal(sums, expected)
                else:
                    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
        brought.append(
            ({name: table.numpy() for name, table in out.items()}, {name: sums.numpy() for name, sums in kept.items()})
        )
    return brought, stats


def changed_positions(stream: HashedStream, placement: PlacementName) -> np.ndarray:
    positions = np.arange(stream.rows)
    return positions[(positions % 4 == 0) | (positions % 5 == 0)]


def flat(placement: PlacementName, verify: Any) -> tuple[list[Any], dict[str, float]]:
    brought, stats = run_steps(placement, verify, None)
    return brought, stats.as_dict()


@pytest.mark.parametrize(
    ("world_size", "placement", "verify"),
    [(1, "scrambled", "off"), (2, "contiguous", "off"), (2, "scrambled", "full"), (4, "contiguous", "ids")],
)
def test_fetch_patch_and_return(world_size: int, placement: PlacementName, verify: str) -> None:
    results = [flat(placement, verify)] if world_size == 1 else run_distributed(flat, world_size, placement, verify)
    sent = sum(stats["bytes_sent"] for _, stats in results)
    assert sent == sum(stats["bytes_received"] for _, stats in results)
    assert (sent == 0) == (world_size == 1)
    assert all(stats["rows_read/host"] > 0 for _, stats in results)


def both_ways(row_backend: str | None) -> tuple[Any, Any, Any]:
    # Machines and pipeline stages are played: two nodes of two ranks, in one memory group.
    assert len(hosts_of_world()) == 4 and equal_nodes(hosts_of_world()) is None
    nodes = create_node_layout([[0, 1, 2, 3]], 2, row_backend=row_backend, timeout=timedelta(seconds=60))
    one, _ = run_steps("scrambled", "full", None)
    two, _ = run_steps("scrambled", "full", nodes)
    again, _ = run_steps("scrambled", "full", nodes)
    return one, two, again


@pytest.mark.parametrize("row_backend", [None, "gloo"])
def test_two_hops_bring_the_same_rows_and_repeat_bit_for_bit(row_backend: str | None) -> None:
    for one, two, again in run_distributed(both_ways, 4, row_backend):
        for step_one, step_two, step_again in zip(one, two, again, strict=True):
            for (rows, sums), (rows_two, sums_two), (rows_again, sums_again) in [(step_one, step_two, step_again)]:
                assert all(np.array_equal(rows[name], rows_two[name]) for name in rows)
                assert all(np.array_equal(rows[name], rows_again[name]) for name in rows)
                assert all(np.array_equal(sums_two[name], sums_again[name]) for name in sums)
                for name in sums:
                    np.testing.assert_allclose(sums_two[name], sums[name], rtol=1e-6, atol=1e-6)


def bytes_between_nodes(rows: int) -> list[int]:
    """What this rank receives from the other node over one hop, and over two, when all ranks want the same rows."""
    stream = HashedStream("a", 4 * rows, (64,))
    spec, placement = stream.tables[0], Placement("contiguous", 4 * rows)
    tables = {spec.name: OwnedTable.create(spec, owners=4, owner=dist.get_rank(), seed=0)}
    nodes = create_node_layout([[0, 1, 2, 3]], 2, row_backend=None, timeout=timedelta(seconds=60))
    plan = FetchPlan(1, True, 1, {"a": plan_stream("a", placement, [np.arange(4 * rows)], 4)})
    all_to_all, received = dist.all_to_all_single, 0

    def counting(output: Any, input: Any, output_sizes: list[int], input_sizes: list[int], group: Any) -> None:
        nonlocal received
        for sender, size in zip(dist.get_process_group_ranks(group), output_sizes, strict=True):
            received += size if sender // 2 != dist.get_rank() // 2 else 0
        all_to_all(output, input, output_sizes, input_sizes, group=group)

    dist.all_to_all_single = counting
    results = []
    for layout in (None, nodes):
        exchange, received = Exchange([stream], tables, dist.group.WORLD, nodes=layout), 0
        requests = exchange.request(plan, StepStats())
        exchange.fetch(plan, requests, {spec.name: torch.empty(4 * rows, 64)}, StepStats())
        results.append(received)
    return results


def test_a_row_enters_a_node_once() -> None:
    rows, row_bytes = 50, 64 * 4
    for one_hop, two_hops in run_distributed(bytes_between_nodes, 4, rows):
        # Two owners are on the other node; over two hops each rank asks one of them, on behalf of both ranks of its node.
        assert 2 * rows * row_bytes < one_hop < 2.2 * rows * row_bytes
        assert 1 * rows * row_bytes < two_hops < 1.1 * rows * row_bytes


def nothing_to_exchange() -> None:
    exchange = Exchange([], {}, dist.group.WORLD)
    plan, stats = FetchPlan(1, True, 0, {}), StepStats()
    requests = exchange.request(plan, stats)
    exchange.fetch(plan, requests, {}, stats)
    assert exchange.patch(plan, requests, {}, stats) == 0
    assert exchange.return_gradients(plan, requests, {}, stats) == {} and stats.bytes_sent == 0


def test_a_stage_without_memory_sends_nothing() -> None:
    run_distributed(nothing_to_exchange, 2)


def test_one_process_gets_its_own_gradients_back_without_a_copy() -> None:
    plan, stats = make_plan(1, 0, "contiguous"), StepStats()
    exchange = Exchange(STREAMS, make_tables("contiguous", 1, 0), None)
    requests = exchange.request(plan, stats)
    gradients = gradients_of(plan, 2)
    returned = exchange.return_gradients(plan, requests, gradients, stats)
    for stream in STREAMS:
        for spec in stream.tables:
            rows, values = returned[spec.name]
            assert np.array_equal(rows, plan.streams[stream.name].ids)
            assert values.data_ptr() == gradients[spec.name].data_ptr() and values.shape == gradients[spec.name].shape
