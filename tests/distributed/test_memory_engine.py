from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamem.batch import StepBatch
from megamem.memory.config import DiskConfig, MemoryConfig, RowOptimizerConfig, StorageConfig
from megamem.memory.engine import MemoryEngine
from megamem.memory.links import create_links
from megamem.parallel.layout import Layout
from megamem.testing.distributed import run_distributed
from megamem.testing.streams import HashedStream, step_batch

SEQUENCES, LENGTH, STEPS = 8, 6, 5


def make_streams() -> list[HashedStream]:
    # 3 rows on 4 ranks leave the last owner without any; 1 row on 4 ranks leaves three of them.
    return [HashedStream("a", 101, (4, 1), k=3), HashedStream("b", 3, (5,), k=1), HashedStream("c", 1, (2,), k=2)]


def reduce_over_world(array: np.ndarray, operation: str) -> np.ndarray:
    if dist.is_initialized():
        tensor = torch.from_numpy(array.copy())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
        return tensor.numpy()
    return array


def train(
    memory: MemoryConfig, tp: int = 1, disk_root: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float], list[dict[str, float]]]:
    """Owned rows and state after some steps with the logical rows they belong to, gradient norms, stats of every step."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    dp, tp_rank = size // tp, rank % tp
    streams = make_streams()
    engine = MemoryEngine(
        streams,
        memory=memory,
        seed=5,
        links=create_links(Layout(world_size=size, tp=tp), memory, torch.device("cpu")),
        device="cpu",
        disk_root=Path(disk_root) if disk_root else None,
        slice_index=tp_rank,
        slices=tp,
    )

    def batch_of(step: int) -> StepBatch:
        # Four sequences in the last steps leave the last ranks of eight sequences' worth without a full micro-batch.
        return step_batch(step, sequences=SEQUENCES, length=LENGTH, vocabulary=40, dp_rank=rank // tp, dp_size=dp)

    norms, stats, ahead = [], [], []
    for step in range(1, STEPS + 1):
        while len(ahead) <= memory.prefetch_depth and step + len(ahead) <= STEPS:
            ahead.append(engine.submit(batch_of(step + len(ahead))))
        taken = engine.take(ahead.pop(0))
        for i, micro in enumerate(batch_of(step).micro_batches):
            view = taken.micro(i)
            positions = slice(tp_rank * LENGTH // tp, (tp_rank + 1) * LENGTH // tp)
            weight = torch.from_numpy(np.sin(micro.tokens + micro.sample_ids[:, None]))[:, positions, None, None]
            for stream in streams:
                for spec in stream.tables:
                    looked_up = view.lookup(spec.name, stream.name).transpose(0, 1)
                    (dp * (weight * looked_up + looked_up.square())).sum().backward()
        gradients = engine.return_gradients(taken)
        norms.append(gradients.norm_sq(reduce_over_world))
        gradients.scale(0.1)
        stats.append(engine.stats)
        engine.apply(gradients, lr=0.05, step=step)
    tensors, rows = {}, {}
    for name, table in engine.tables.items():
        rows[name] = table.placement.logical(np.arange(table.start, table.stop))
        for key, tensor in table.read(table.start, table.stop).items():
            tensors[f"{name}/{key}"] = tensor.float().numpy()
    engine.close()
    return tensors, rows, norms, stats


def whole(results: list[Any]) -> dict[str, np.ndarray]:
    """Tensors of all owners in the order of logical rows."""
    joined = {}
    for key in results[0][0]:
        order = np.argsort(np.concatenate([rows[key.split("/")[0]] for _, rows, _, _ in results]))
        joined[key] = np.concatenate([tensors[key] for tensors, _, _, _ in results])[order]
    return joined


def config(optimizer: str = "lazy_adam", **options: Any) -> MemoryConfig:
    return MemoryConfig(optimizer=RowOptimizerConfig(name=optimizer, weight_decay=0.1), **options)


@pytest.mark.parametrize(
    ("optimizer", "world_size", "tp"),
    [
        ("lazy_adam", 2, 1),
        ("rowwise_adagrad", 2, 2),
        ("lazy_adam", 4, 2),
        ("sgd", 2, 1),
        ("partial_rowwise_adam", 4, 1),
        ("sinkhorn_momentum", 4, 1),
    ],
)
def test_owners_equal_one_process_and_repeat_bit_for_bit(optimizer: str, world_size: int, tp: int) -> None:
    single = train(config(optimizer), 1)
    expected, expected_norms, expected_stats = whole([single]), single[2], single[3]
    first = run_distributed(train, world_size, config(optimizer), tp)
    tensors = whole(first)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        np.testing.assert_allclose(tensor, expected[key], rtol=1e-5, atol=1e-5, err_msg=key)
    np.testing.assert_allclose(first[0][2], expected_norms, rtol=1e-5)
    for key in expected_stats[-1]:
        if key == "lookups" or key.startswith("touched_rows/"):
            assert sum(stats[-1][key] for _, _, _, stats in first) == expected_stats[-1][key]
    sent, received = (sum(stats[-1][key] for _, _, _, stats in first) for key in ("bytes_sent", "bytes_received"))
    assert sent == received > 0

    second = whole(run_distributed(train, world_size, config(optimizer), tp))
    assert all(np.array_equal(tensor, second[key]) for key, tensor in tensors.items())


FORMS: dict[str, dict[str, Any]] = {
    "depth 0": {"prefetch_depth": 0},
    "depth 3": {"prefetch_depth": 3},
    "scrambled": {"placement": "scrambled"},
    "scrambled, depth 0": {"placement": "scrambled", "prefetch_depth": 0},
    "disk": {"storage": StorageConfig(tier="disk"), "disk": DiskConfig(cache_gib=1e-6)},
    "disk, depth 3": {"storage": StorageConfig(tier="disk"), "disk": DiskConfig(cache_gib=1e-6), "prefetch_depth": 3},
    "rows in memory, state on disk": {"storage": StorageConfig(state_tier="disk")},
    "device": {"storage": StorageConfig(tier="device")},
    "shared memory": {"host_memory": "shared"},
    "checksums": {"verify": "full"},
}


@pytest.mark.parametrize("row_format", ["fp32", "bf16", "fp8"])
def test_prefetch_tier_and_placement_change_no_bit(row_format: str, tmp_path: Path) -> None:
    """Two ranks: rows, state and norms after five steps are the same bit for bit in every form."""

    def run(name: str, options: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[float], Any]:
        options = dict(options)
        storage = options.pop("storage", StorageConfig())
        storage = dataclasses.replace(storage, format=row_format)
        folder = tmp_path / name.replace(" ", "_")
        results = run_distributed(train, 2, config(storage=storage, **options), 1, str(folder))
        return whole(results), results[0][2], results

    tensors, norms, results = run("depth 1", {})
    assert sum(step["patched_rows"] for _, _, _, stats in results for step in stats) > 0
    forms = FORMS if row_format == "fp32" else {k: v for k, v in FORMS.items() if k in ("depth 0", "scrambled", "disk")}
    for name, options in forms.items():
        other, other_norms, _ = run(name, options)
        assert other_norms == norms, name
        for key, tensor in tensors.items():
            assert np.array_equal(tensor, other[key]), (name, key)


@pytest.mark.parametrize(("depth", "staleness"), [(1, 1), (3, 2)])
def test_stale_rows_are_the_same_in_every_run_and_counted(depth: int, staleness: int) -> None:
    options = {"prefetch_depth": depth, "staleness": staleness}
    first, second = (run_distributed(train, 2, config(**options)) for _ in range(2))
    assert first[0][2] == second[0][2]
    for key, tensor in whole(first).items():
        assert np.array_equal(tensor, whole(second)[key]), key
    assert sum(step["stale_rows"] for _, _, _, stats in first for step in stats) > 0
    exact = run_distributed(train, 2, config(prefetch_depth=depth))
    assert exact[0][2] != first[0][2], "stale rows change the numbers"


def train_on_two_nodes(memory: MemoryConfig) -> Any:
    """Four ranks that take themselves for two nodes of two."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return train(memory)


def test_two_hops_between_nodes_train_like_one() -> None:
    flat = run_distributed(train, 4, config())
    two, again = (run_distributed(train_on_two_nodes, 4, config(hierarchical="on")) for _ in range(2))
    for key, tensor in whole(two).items():
        np.testing.assert_allclose(tensor, whole(flat)[key], rtol=1e-5, atol=1e-5, err_msg=key)
        assert np.array_equal(tensor, whole(again)[key]), key
    synchronous = run_distributed(train_on_two_nodes, 4, config(hierarchical="on", prefetch_depth=0))
    for key, tensor in whole(two).items():
        assert np.array_equal(tensor, whole(synchronous)[key]), key
