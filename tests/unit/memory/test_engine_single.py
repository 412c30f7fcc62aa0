from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamem.batch import MicroBatch, StepBatch
from megamem.memory.config import RowOptimizerConfig
from megamem.memory.engine import MemoryEngine, StepMemory
from megamem.memory.table import InitSegment, TableSpec


class ModuloStream:
    """``k`` hashed rows per token; evaluation reads row 0."""

    def __init__(self, name: str, rows: int, widths: tuple[int, ...], k: int = 2) -> None:
        self.name, self.rows, self.k = name, rows, k
        self.tables = tuple(TableSpec(f"{name}.{i}", rows, w, (InitSegment(w, 0.5),)) for i, w in enumerate(widths))

    def addresses(self, micro: MicroBatch, positions: slice, *, train: bool = True) -> np.ndarray:
        ids = (micro.tokens[:, positions, None] * 3 + np.arange(self.k) * 5) % self.rows
        return ids if train else np.zeros_like(ids)


def step_batch(step: int, *, micro_batches: int = 2, b: int = 2, s: int = 5, vocabulary: int = 64) -> StepBatch:
    rng = np.random.default_rng(step)
    micros = []
    for _ in range(micro_batches):
        tokens = rng.integers(0, vocabulary, (b, s))
        micros.append(
            MicroBatch(
                sample_ids=np.arange(b),
                tokens=tokens,
                labels=tokens,
                loss_mask=np.ones((b, s), dtype=np.float32),
                document_ids=np.zeros((b, s), dtype=np.int32),
                document_paths=np.zeros((1, 0), dtype=np.int64),
            )
        )
    return StepBatch(step=step, micro_batches=tuple(micros))


def make_engine(streams: list[Any], **options: Any) -> MemoryEngine:
    return MemoryEngine(streams, optimizer=RowOptimizerConfig(**options), seed=1, group=None, device="cpu")


def loss_of(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Something whose gradient differs from row to row and from use to use."""
    looked_up = rows[index]
    position = torch.arange(looked_up.numel()).view(looked_up.shape)
    return (torch.sin(position + 1.0) * looked_up).sum() + looked_up.sum(2).square().mean()


def run_backward(memory: StepMemory, streams: list[Any], micro_batches: int = 2) -> None:
    for i in range(micro_batches):
        micro = memory.micro(i)
        for stream in streams:
            for spec in stream.tables:
                loss_of(micro.rows(spec.name), micro.index(stream.name)).backward()


def snapshot(engine: MemoryEngine) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor.clone()
        for name, table in engine.tables.items()
        for key, tensor in {"rows": table.rows, **table.state}.items()
    }


def test_five_steps_equal_dense_embeddings_under_adamw() -> None:
    streams = [ModuloStream("a", 7, (3, 1)), ModuloStream("b", 4, (5,), k=1)]
    engine = make_engine(streams, name="lazy_adam", lr_multiplier=3.0, weight_decay=0.1)
    dense = {
        name: torch.nn.Embedding.from_pretrained(t.rows.clone(), freeze=False) for name, t in engine.tables.items()
    }
    weights = [embedding.weight for embedding in dense.values()]
    adamw = torch.optim.AdamW(weights, lr=0.06, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        batch = step_batch(step)
        engine.submit(batch)
        memory = engine.take(step)
        run_backward(memory, streams)
        gradients = engine.return_gradients(memory)
        adamw.zero_grad()
        for micro in batch.micro_batches:
            for stream in streams:
                ids = torch.from_numpy(stream.addresses(micro, slice(0, 5)))
                for spec in stream.tables:
                    loss_of(dense[spec.name].weight, ids).backward()
        for name, embedding in dense.items():
            assert len(gradients.rows[name]) == engine.tables[name].spec.rows, "this test needs every row touched"
            torch.testing.assert_close(gradients.values[name], embedding.weight.grad, rtol=1e-5, atol=1e-6)
        norm_sq = sum(float(weight.grad.square().sum()) for weight in weights)
        assert gradients.norm_sq() == pytest.approx(norm_sq, rel=1e-5)
        gradients.scale(0.5)
        for weight in weights:
            weight.grad *= 0.5
        adamw.step()
        engine.apply(gradients, lr=0.02, step=step)
    for name, embedding in dense.items():
        torch.testing.assert_close(engine.tables[name].rows, embedding.weight.detach(), rtol=1e-5, atol=2e-6)


def test_rows_behind_the_index_are_the_addressed_rows_of_each_micro_batch() -> None:
    stream = ModuloStream("a", 50, (3,))
    engine = make_engine([stream])
    batch = step_batch(9)
    engine.submit(batch)
    memory = engine.take(9)
    for i, micro in enumerate(batch.micro_batches):
        ids = torch.from_numpy(stream.addresses(micro, slice(0, 5)))
        view = memory.micro(i)
        assert view.index("a").shape == (2, 5, 2) and view.index("a").dtype == torch.int64
        np.testing.assert_array_equal(view.host_index("a"), view.index("a").numpy())
        assert torch.equal(view.rows("a.0")[view.index("a")], engine.tables["a.0"].rows[ids])
        assert view.rows("a.0").is_leaf and view.rows("a.0").requires_grad
        assert view.rows("a.0") is memory.micro(0).rows("a.0")


def test_rows_are_read_when_a_step_is_taken_not_when_it_is_submitted() -> None:
    stream = ModuloStream("a", 5, (2,))
    engine = make_engine([stream])
    engine.submit(step_batch(1))
    engine.submit(step_batch(2))
    memory = engine.take(1)
    run_backward(memory, [stream])
    engine.apply(engine.return_gradients(memory), lr=0.1, step=1)
    micro = engine.take(2).micro(0)
    ids = torch.from_numpy(stream.addresses(step_batch(2).micro_batches[0], slice(0, 5)))
    assert torch.equal(micro.rows("a.0")[micro.index("a")], engine.tables["a.0"].rows[ids])


@pytest.mark.parametrize("name", ["lazy_adam", "rowwise_adagrad"])
def test_a_blocked_step_leaves_every_byte(name: str) -> None:
    stream = ModuloStream("a", 11, (2,))
    engine = make_engine([stream], name=name)
    for step in (1, 2):
        engine.submit(step_batch(step))
        memory = engine.take(step)
        run_backward(memory, [stream])
        gradients = engine.return_gradients(memory)
        if step == 1:
            engine.apply(gradients, lr=0.1, step=step)
            before = snapshot(engine)
    assert all(torch.equal(tensor, before[key]) for key, tensor in snapshot(engine).items())


def test_a_working_set_without_gradient_counts_as_zero() -> None:
    engine = make_engine([ModuloStream("a", 11, (2, 3))])
    engine.submit(step_batch(1))
    memory = engine.take(1)
    memory.micro(0).rows("a.1").sum().backward()
    gradients = engine.return_gradients(memory)
    assert not gradients.values["a.0"].any() and bool((gradients.values["a.1"] == 1).all())
    assert memory.micro(0).rows("a.1").grad is None


def test_evaluation_has_no_gradients_and_its_own_addresses() -> None:
    engine = make_engine([ModuloStream("a", 11, (2,))])
    engine.submit(step_batch(3), train=False)
    memory = engine.take(3)
    rows = memory.micro(1).rows("a.0")
    assert not rows.requires_grad and torch.equal(rows, engine.tables["a.0"].rows[:1])
    with pytest.raises(ValueError, match="submitted without train"):
        engine.return_gradients(memory)


def test_steps_are_taken_in_the_order_of_submission() -> None:
    engine = make_engine([ModuloStream("a", 11, (2,))])
    with pytest.raises(ValueError, match="step 1 is not the next of the submitted steps"):
        engine.take(1)
    engine.submit(step_batch(1))
    engine.submit(step_batch(2))
    with pytest.raises(ValueError, match=r"step 2 is not the next of the submitted steps \[1, 2\]"):
        engine.take(2)
    assert engine.take(1).plan.step == 1
    engine.close()
    with pytest.raises(ValueError, match="step 2"):
        engine.take(2)


def test_stats_and_usage() -> None:
    stream = ModuloStream("a", 1000, (2, 4))
    engine = make_engine([stream])
    assert engine.table_usage() == {"a.0": 0.0, "a.1": 0.0}
    engine.submit(step_batch(1, vocabulary=3))
    memory = engine.take(1)
    run_backward(memory, [stream])
    engine.apply(engine.return_gradients(memory), lr=0.1, step=1)
    stats = engine.stats
    assert (stats["lookups"], stats["unique_rows"], stats["unique_ratio"]) == (40, 6, 6 / 40)
    assert stats["rows_received"] == 12 and stats["bytes_received"] == stats["bytes_sent"] == 0
    assert stats["touched_rows/a.0"] == stats["touched_rows/a.1"] == 6
    assert stats["stall_seconds"] > stats["plan_seconds"] > 0 and stats["update_seconds"] > 0
    assert engine.table_usage() == {"a.0": 0.006, "a.1": 0.006}


def test_a_model_without_streams_and_tables_of_another_size() -> None:
    engine = make_engine([])
    engine.submit(step_batch(1))
    memory = engine.take(1)
    assert len(memory.micros) == 2
    gradients = engine.return_gradients(memory)
    assert gradients.norm_sq() == 0 and engine.stats["unique_ratio"] == 0
    engine.apply(gradients, lr=0.1, step=1)
    stream = ModuloStream("a", 8, (2,))
    stream.rows = 9
    with pytest.raises(ValueError, match=r"table a\.0"):
        make_engine([stream])


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest storage that any operation returns, storages of ``known`` tensors apart."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["lazy_adam", "rowwise_adagrad"])
def test_a_step_allocates_nothing_of_the_size_of_a_table(name: str) -> None:
    stream = ModuloStream("a", 100_003, (4,))
    engine = make_engine([stream], name=name)
    table = engine.tables["a.0"]
    tracemalloc.start()
    try:
        with LargestAllocation([table.rows, *table.state.values()]) as largest:
            engine.submit(step_batch(1))
            memory = engine.take(1)
            run_backward(memory, [stream])
            gradients = engine.return_gradients(memory)
            gradients.scale(gradients.norm_sq() ** -0.5)
            engine.apply(gradients, lr=0.1, step=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 40 lookups of rows of 16 bytes; one byte per row of the table would already be 100 kB.
    assert 0 < largest.bytes < 4096
    assert peak < 100_003
