from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamem.batch import MicroBatch, StepBatch
from megamem.errors import ExchangeError
from megamem.memory.config import RowOptimizerConfig
from megamem.memory.engine import MemoryEngine
from megamem.memory.exchange import Exchange
from megamem.memory.plan import plan_step
from megamem.memory.stats import StepStats
from megamem.memory.table import InitSegment, TableSpec
from megamem.testing.distributed import run_distributed

SEQUENCES, LENGTH, STEPS = 8, 6, 5


class HashStream:
    """``k`` rows per token, a function of token and sample."""

    def __init__(self, name: str, rows: int, widths: tuple[int, ...], k: int) -> None:
        self.name, self.rows, self.k = name, rows, k
        self.tables = tuple(TableSpec(f"{name}.{i}", rows, w, (InitSegment(w, 0.5),)) for i, w in enumerate(widths))

    def addresses(self, micro: MicroBatch, positions: slice, *, train: bool = True) -> np.ndarray:
        tokens = micro.tokens[:, positions, None]
        return (tokens * 7 + np.arange(self.k) * (5 + micro.sample_ids[:, None, None])) % self.rows


def make_streams() -> list[HashStream]:
    # 3 rows on 4 ranks leave the last owner without any; 1 row on 4 ranks leaves three of them.
    return [HashStream("a", 101, (4, 1), k=3), HashStream("b", 3, (5,), k=1), HashStream("c", 1, (2,), k=2)]


def sequences(step: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(step).integers(0, 40, (SEQUENCES, LENGTH))
    tokens[-2:] = 3  # very uneven: the last data-parallel rank asks for few rows
    return np.arange(SEQUENCES) + 100 * step, tokens


def step_batch(step: int, dp_rank: int, dp_size: int) -> StepBatch:
    """This rank's share of the sequences of a step, two to a micro-batch."""
    sample_ids, tokens = sequences(step)
    share = range(dp_rank * SEQUENCES // dp_size, (dp_rank + 1) * SEQUENCES // dp_size, 2)
    micros = [
        MicroBatch(
            sample_ids=sample_ids[i : i + 2],
            tokens=tokens[i : i + 2],
            labels=tokens[i : i + 2],
            loss_mask=np.ones((2, LENGTH), dtype=np.float32),
            document_ids=np.zeros((2, LENGTH), dtype=np.int32),
            document_paths=np.zeros((1, 0), dtype=np.int64),
        )
        for i in share
    ]
    return StepBatch(step=step, micro_batches=tuple(micros))


def train(name: str, tp: int) -> tuple[dict[str, np.ndarray], list[float], dict[str, float]]:
    """Owned rows and state after some steps, this rank's squared gradient norms, and the last stats."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    dp, tp_rank = size // tp, rank % tp
    streams = make_streams()
    engine = MemoryEngine(
        streams,
        optimizer=RowOptimizerConfig(name=name, weight_decay=0.1),
        seed=5,
        group=dist.group.WORLD if size > 1 else None,
        device="cpu",
        tp_rank=tp_rank,
        tp_size=tp,
    )
    norms = []
    for step in range(1, STEPS + 1):
        batch = step_batch(step, rank // tp, dp)
        engine.submit(batch)
        memory = engine.take(step)
        for i, micro in enumerate(batch.micro_batches):
            view = memory.micro(i)
            positions = slice(tp_rank * LENGTH // tp, (tp_rank + 1) * LENGTH // tp)
            weight = torch.from_numpy(np.sin(micro.tokens + micro.sample_ids[:, None]))[:, positions, None, None]
            for stream in streams:
                for spec in stream.tables:
                    looked_up = view.rows(spec.name)[view.index(stream.name)]
                    (dp * (weight * looked_up + looked_up.square())).sum().backward()
        gradients = engine.return_gradients(memory)
        norms.append(gradients.norm_sq())
        gradients.scale(0.1)
        engine.apply(gradients, lr=0.01, step=step)
    tensors = {
        f"{name}/{key}": tensor.numpy()
        for name, table in engine.tables.items()
        for key, tensor in {"rows": table.rows, **table.state}.items()
    }
    return tensors, norms, engine.stats


def whole(results: list[Any]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([tensors[key] for tensors, _, _ in results]) for key in results[0][0]}


@pytest.mark.parametrize(
    ("name", "world_size", "tp"), [("lazy_adam", 2, 1), ("rowwise_adagrad", 2, 2), ("lazy_adam", 4, 2)]
)
def test_ranks_equal_one_process_and_repeat_bit_for_bit(name: str, world_size: int, tp: int) -> None:
    expected_tensors, expected_norms, expected_stats = train(name, 1)
    first = run_distributed(train, world_size, name, tp)
    tensors = whole(first)
    assert tensors.keys() == expected_tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_allclose(tensor, expected_tensors[key], rtol=1e-5, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(np.sum([norms for _, norms, _ in first], axis=0), expected_norms, rtol=1e-5)
    for key in expected_stats:
        if key == "lookups" or key.startswith("touched_rows/"):
            assert sum(stats[key] for _, _, stats in first) == expected_stats[key]
    assert (
        sum(stats["bytes_sent"] for _, _, stats in first) == sum(stats["bytes_received"] for _, _, stats in first) > 0
    )

    second = whole(run_distributed(train, world_size, name, tp))
    assert all(np.array_equal(tensor, second[key]) for key, tensor in tensors.items())


def lie(header: list[int], ids: list[int]) -> str:
    """Rank 0 fetches in good faith; rank 1 sends it ``header`` (step, count of the stream) and then ``ids``."""
    stream = HashStream("a", 10, (2,), k=1)
    if dist.get_rank() == 1:
        heads, sizes = torch.tensor([*header, 1, 0]), [2, 2]
        dist.all_to_all_single(torch.empty(4, dtype=torch.int64), heads, sizes, sizes)
        if ids:
            received = torch.empty(2, dtype=torch.int64)
            dist.all_to_all_single(received, torch.tensor(ids), [2, 0], [len(ids), 0])
        return ""
    tokens = np.array([[8, 9]])  # rows 6 and 3: one of each owner
    micro = MicroBatch(
        sample_ids=np.zeros(1, dtype=np.int64),
        tokens=tokens,
        labels=tokens,
        loss_mask=np.ones((1, 2), dtype=np.float32),
        document_ids=np.zeros((1, 2), dtype=np.int32),
        document_paths=np.zeros((1, 0), dtype=np.int64),
    )
    plan = plan_step(StepBatch(step=1, micro_batches=(micro,)), [stream], owners=2)
    try:
        Exchange([stream], dist.group.WORLD).fetch(plan, {}, StepStats())
    except ExchangeError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("header", "ids", "message"),
    [
        ([1, 6], [], "rank 1 of the memory group asks rank 0 for 6 rows of stream a, which has 5 here"),
        ([1, -1], [], "asks rank 0 for -1 rows of stream a"),
        ([2, 1], [], "rank 1 of the memory group is at step 2 while rank 0 is at step 1"),
        ([1, 3], [0, 5, 9], "rank 1 of the memory group asks rank 0 for row 5 of stream a"),
        ([1, 2], [3, 3], "asks rank 0 for row 3 of stream a, which is repeated"),
        ([1, 2], [-4, 3], "asks rank 0 for row -4 of stream a"),
    ],
)
def test_what_another_rank_asks_for_is_validated(header: list[int], ids: list[int], message: str) -> None:
    assert message in run_distributed(lie, 2, header, ids)[0]
