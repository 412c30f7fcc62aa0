"""What goes wrong between ranks ends in an error that names it, on every rank, within seconds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamem.errors import ExchangeError
from megamem.memory.config import StorageConfig
from megamem.memory.exchange import Exchange
from megamem.memory.exchange.nodes import create_node_layout
from megamem.memory.placement import Placement
from megamem.memory.plan import FetchPlan, plan_stream
from megamem.memory.stats import StepStats
from megamem.memory.table import OwnedTable
from megamem.testing.distributed import run_distributed
from megamem.testing.streams import HashedStream

STREAM = HashedStream("a", 64, (8,))
TABLE = STREAM.tables[0].name
DEADLINE = 40.0
"""Seconds until every rank must have ended, starting them included; gloo would wait much longer."""


def outcomes(world_size: int, function: Callable[..., None], *args: Any) -> dict[int, str]:
    """How ``function(*args)`` ended on each rank that lived to tell: "fine", or the sentence of its error. As under torchrun, a
    rank that fails exits."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "megamem.testing.preload"])
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        ranks = [
            context.Process(target=run_rank, args=(queue, rank, world_size, folder, function, args))
            for rank in range(world_size)
        ]
        start, results = time.monotonic(), {}
        for process in ranks:
            process.start()
        try:
            while any(process.is_alive() for process in ranks) or not queue.empty():
                assert time.monotonic() - start < DEADLINE, f"ranks hang; ended so far: {results}"
                try:
                    results.update([queue.get(timeout=0.1)])
                except Empty:
                    continue
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return results


def run_rank(queue: Any, rank: int, world_size: int, folder: str, function: Any, args: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=10 * DEADLINE)
    )
    try:
        function(*args)
        outcome = "fine"
    except ExchangeError as error:
        outcome = str(error)
    queue.put((rank, outcome))
    queue.close()
    queue.join_thread()
    os._exit(0)


class Damage:
    """Stands in for ``dist.all_to_all_single`` on one rank, and changes a message on its way to rank 0."""

    def __init__(self, message: int, change: Callable[[np.ndarray], None]) -> None:
        """``message``: which all-to-all, from 0."""
        self.message, self.change, self.send = message, change, dist.all_to_all_single

    def __call__(self, output: Any, input: Any, output_sizes: Any, input_sizes: Any, **kwargs: Any) -> None:
        if self.message == 0:
            self.change(input[: input_sizes[0]].numpy())
        self.message -= 1
        self.send(output, input, output_sizes, input_sizes, **kwargs)


def flip(byte: int) -> Callable[[np.ndarray], None]:
    def change(message: np.ndarray) -> None:
        message[byte] ^= 1

    return change


def write(dtype: str, place: int, value: int) -> Callable[[np.ndarray], None]:
    def change(message: np.ndarray) -> None:
        message.view(dtype)[place] = value

    return change


def run_damaged() -> list[str]:
    """How one step ends on this rank for each of :data:`DAMAGES` that rank 1 does to its messages to rank 0."""
    ended = []
    for verify, message, (kind, *where), _ in DAMAGES:
        group = dist.new_group([0, 1], backend="gloo")
        send = dist.all_to_all_single
        if dist.get_rank() == 1:
            dist.all_to_all_single = Damage(message, {"flip": flip, "write": write}[kind](*where))
        try:
            run_step(verify, group=group)
            ended.append("fine")
        except ExchangeError as error:
            ended.append(str(error))
        dist.all_to_all_single = send
        dist.destroy_process_group(group)  # as if the rank had ended
        del group
        gc.collect()
        dist.barrier()
    return ended


def run_step(verify: Any, numbers: Sequence[int] = (1,), group: Any = None, nodes: Any = None) -> None:
    table = OwnedTable.create(
        STREAM.tables[0],
        owners=dist.get_world_size(),
        owner=dist.get_rank(),
        seed=0,
        storage=StorageConfig(format="bf16"),
    )
    exchange = Exchange([STREAM], {TABLE: table}, group or dist.group.WORLD, verify=verify, nodes=nodes)
    ids = np.arange(2, 62, 3)
    placement = Placement("contiguous", 64)
    for number in numbers:
        plan = FetchPlan(number, True, 1, {"a": plan_stream("a", placement, [ids], dist.get_world_size())})
        stats, out = StepStats(), {TABLE: torch.empty(len(ids), 8)}
        requests = exchange.request(plan, stats)
        exchange.fetch(plan, requests, out, stats)
        requests.mark("a", np.arange(table.stop - table.start))
        assert exchange.patch(plan, requests, out, stats) == len(ids)
        exchange.return_gradients(plan, requests, {TABLE: torch.ones(len(ids), 8)}, stats)


# Messages of a step: 0 counts, 1 ids, 2 rows, 3 counts of the patch, 4 patches, 5 gradients. In a header: what is being done, the
# step, the count. Rank 1 asks rank 0 for 10 of its 32 rows: 2, 5, ..., 29.
DAMAGES: list[tuple[str, int, tuple[Any, ...], str]] = [
    (
        "ids",
        0,
        ("flip", 16),
        "the row counts that rank 1 of the memory group sent rank 0 in step 1 for all streams did not",
    ),
    (
        "off",
        0,
        ("write", "i8", 2, 33),
        "the request of rank 1 of the memory group to rank 0 in step 1 is for 33 rows of",
    ),
    ("off", 0, ("write", "i8", 2, -1), "is for -1 rows of stream a, of which there are 32"),
    (
        "off",
        0,
        ("write", "i8", 1, 7),
        "rank 1 of the memory group is at the request of step 7 while rank 0 is at the",
    ),
    (
        "off",
        0,
        ("write", "i8", 0, 1),
        "rank 1 of the memory group is at the patch of step 1 while rank 0 is at the request",
    ),
    (
        "ids",
        1,
        ("flip", 8),
        "the row ids that rank 1 of the memory group sent rank 0 in step 1 for stream a did not arrive as",
    ),
    (
        "off",
        1,
        ("write", "i4", 3, 32),
        "rank 1 of the memory group sent rank 0 in step 1 row 32 of stream a, which is",
    ),
    ("off", 1, ("write", "i4", 3, 8), "sent rank 0 in step 1 row 8 of stream a, which is repeated"),
    ("off", 1, ("write", "i4", 0, -4), "sent rank 0 in step 1 row -4 of stream a"),
    (
        "full",
        2,
        ("flip", 33),
        "the rows that rank 1 of the memory group sent rank 0 in step 1 for stream a did not arrive as",
    ),
    ("ids", 3, ("flip", 16), "the row counts that rank 1 of the memory group sent rank 0"),
    (
        "off",
        3,
        ("write", "i8", 2, 11),
        "the patch of rank 1 of the memory group to rank 0 in step 1 is for 11 rows of",
    ),
    (
        "ids",
        4,
        ("flip", 99),
        "the patches that rank 1 of the memory group sent rank 0 in step 1 for stream a did not arrive as",
    ),
    ("off", 4, ("write", "i4", 2, 1), "sent rank 0 in step 1 row 1 of stream a, which is repeated"),
    (
        "full",
        5,
        ("flip", 0),
        "the gradients that rank 1 of the memory group sent rank 0 in step 1 for stream a did not arrive as",
    ),
]


def test_damaged_messages() -> None:
    first, second = run_distributed(run_damaged, 2)
    for (_, message, _, sentence), ended, ended_there in zip(DAMAGES, first, second, strict=True):
        assert sentence in ended
        assert message == 5 or "broke off on rank 1 of the memory group" in ended_there


def test_undamaged_steps_end_well() -> None:
    assert set(outcomes(2, run_step, "full", (1, 2)).values()) == {"fine"}


def drift() -> None:
    run_step("ids", (1 + (dist.get_rank() == 2),))


def test_ranks_that_have_drifted_apart() -> None:
    ended = outcomes(3, drift)
    assert "rank 2 of the memory group is at the request of step 2 while rank 0 is at the request of step 1" in ended[0]
    assert "is at the request of step 1 while rank 2 is at the request of step 2" in ended[2]
    assert len(ended) == 3 and "fine" not in ended.values()


def die(call: str) -> None:
    if dist.get_rank() == 1:
        setattr(Exchange, call, lambda *_: os._exit(9))
    run_step("ids")


@pytest.mark.parametrize("call", ["request", "fetch", "patch", "return_gradients"])
def test_killed_owner(call: str) -> None:
    ended = outcomes(3, die, call)
    assert set(ended) == {0, 2}
    for rank, sentence in ended.items():
        assert f"of step 1 broke off on rank {rank} of the memory group: " in sentence
        assert "Connection closed by peer" in sentence or "Connection reset by peer" in sentence
        assert sentence.endswith("another rank stopped or cannot be reached, its own message says why")


def die_on_another_node() -> None:
    nodes = create_node_layout([[0, 1, 2, 3]], 2, row_backend=None, timeout=timedelta(seconds=10 * DEADLINE))
    if dist.get_rank() == 3:
        Exchange.fetch = lambda *_: os._exit(9)  # type: ignore[method-assign]
    run_step("ids", nodes=nodes)


def test_killed_owner_is_noticed_over_two_hops() -> None:
    ended = outcomes(4, die_on_another_node)
    assert set(ended) == {0, 1, 2} and all("of step 1 broke off" in sentence for sentence in ended.values())


def fall_asleep() -> None:
    group = dist.new_group(timeout=timedelta(seconds=2), backend="gloo")
    if dist.get_rank() == 1:
        time.sleep(5)
    run_step("ids", group=group)


def test_a_rank_that_keeps_others_waiting() -> None:
    ended = outcomes(2, fall_asleep)
    assert "the exchange of row counts of step 1 broke off on rank 0 of the memory group: Timed out" in ended[0]
    assert "broke off on rank 1 of the memory group" in ended[1]


def other_length(message: int, words: int) -> None:
    """Rank 1 sends rank 0 more or fewer words than it has announced."""
    if dist.get_rank() == 1:
        send, calls = dist.all_to_all_single, iter(range(99))

        def changed(output: Any, input: Any, output_sizes: Any, input_sizes: list[int], **kwargs: Any) -> None:
            if next(calls) == message:
                first = input_sizes[0] + 8 * words
                rest = input[input_sizes[0] :]
                input_sizes = [first, *input_sizes[1:]]
                input = torch.cat([torch.zeros(8 * max(0, words), dtype=torch.uint8), input[:first], rest])[
                    : sum(input_sizes)
                ]
            send(output, input, output_sizes, input_sizes, **kwargs)

        dist.all_to_all_single = changed
    run_step("off", (1, 2))


@pytest.mark.parametrize("message", [1, 2, 8, 11])
def test_messages_shorter_than_announced(message: int) -> None:
    """gloo takes them and leaves the rest of the buffer as it was, such as what the step before had put there."""
    assert "did not arrive as they were sent" in outcomes(2, other_length, message, -1)[0]


def test_messages_longer_than_announced() -> None:
    """gloo ends the process that gets one; the other ranks notice."""
    assert outcomes(2, other_length, 2, 1)[1].startswith("the exchange of ")
