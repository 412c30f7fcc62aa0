from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamem.memory.config import MemoryConfig, RowOptimizerConfig
from megamem.memory.engine import MemoryEngine
from megamem.memory.step import StepMemory
from megamem.testing.streams import HashedStream, step_batch


def make_engine(streams: list[Any], *, depth: int = 0, **optimizer: Any) -> MemoryEngine:
    memory = MemoryConfig(optimizer=RowOptimizerConfig(**optimizer), prefetch_depth=depth)
    return MemoryEngine(streams, memory=memory, seed=1, device="cpu")


def alone(array: np.ndarray, _: str) -> np.ndarray:
    """The reduction over one rank."""
    return array


def rows_of(engine: MemoryEngine, name: str) -> torch.Tensor:
    return engine.tables[name].read(0, engine.tables[name].stop)["rows"]


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
        for key, tensor in table.read(table.start, table.stop).items()
    }


def test_five_steps_equal_dense_embeddings_under_adamw() -> None:
    streams = [HashedStream("a", 5, (3, 1)), HashedStream("b", 3, (5,), k=1)]
    engine = make_engine(streams, name="lazy_adam", weight_decay=0.1)
    dense = {
        name: torch.nn.Embedding.from_pretrained(rows_of(engine, name), freeze=False)
        for name, t in engine.tables.items()
    }
    weights = [embedding.weight for embedding in dense.values()]
    adamw = torch.optim.AdamW(weights, lr=0.06, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        batch = step_batch(step)
        memory = engine.take(engine.submit(batch))
        run_backward(memory, streams)
        gradients = engine.return_gradients(memory)
        adamw.zero_grad()
        for micro in batch.micro_batches:
            for stream in streams:
                ids = torch.from_numpy(stream.addresses(micro, slice(0, 6)))
                for spec in stream.tables:
                    loss_of(dense[spec.name].weight, ids).backward()
        for name, embedding in dense.items():
            assert len(gradients.rows[name]) == engine.tables[name].spec.rows, "this test needs every row touched"
            torch.testing.assert_close(gradients.values[name], embedding.weight.grad, rtol=1e-5, atol=1e-6)
        norm_sq = sum(float(weight.grad.square().sum()) for weight in weights)
        assert gradients.norm_sq(alone) == pytest.approx(norm_sq, rel=1e-5)
        gradients.scale(0.5)
        for weight in weights:
            weight.grad *= 0.5
        adamw.step()
        engine.apply(gradients, lr=0.06, step=step)
    for name, embedding in dense.items():
        torch.testing.assert_close(rows_of(engine, name), embedding.weight.detach(), rtol=1e-5, atol=2e-6)


def test_rows_behind_the_index_are_the_addressed_rows_of_each_micro_batch() -> None:
    stream = HashedStream("a", 50, (3,))
    engine = make_engine([stream])
    batch = step_batch(9)
    memory = engine.take(engine.submit(batch))
    for i, micro in enumerate(batch.micro_batches):
        ids = torch.from_numpy(stream.addresses(micro, slice(0, 6)))
        view = memory.micro(i)
        assert view.index("a").shape == (2, 6, 2) and view.index("a").dtype == torch.int64
        np.testing.assert_array_equal(view.host_index("a"), view.index("a").numpy())
        assert torch.equal(view.rows("a.0")[view.index("a")], rows_of(engine, "a.0")[ids])
        assert view.rows("a.0").is_leaf and view.rows("a.0").requires_grad
        assert view.rows("a.0") is memory.micro(0).rows("a.0")


@pytest.mark.parametrize("depth", [0, 1])
def test_rows_of_a_step_have_every_update_before_it(depth: int) -> None:
    stream = HashedStream("a", 5, (2,))
    engine = make_engine([stream], depth=depth)
    first = engine.submit(step_batch(1))
    second = engine.submit(step_batch(2)) if depth else None
    memory = engine.take(first)
    run_backward(memory, [stream])
    engine.apply(engine.return_gradients(memory), lr=0.1, step=1)
    micro = engine.take(second or engine.submit(step_batch(2))).micro(0)
    ids = torch.from_numpy(stream.addresses(step_batch(2).micro_batches[0], slice(0, 6)))
    assert torch.equal(micro.rows("a.0")[micro.index("a")], rows_of(engine, "a.0")[ids])
    assert engine.stats["patched_rows"] == (5 if depth else 0)
    engine.close()


def test_lookup_equals_indexing_with_its_gradient() -> None:
    stream = HashedStream("a", 11, (3,))
    engine = make_engine([stream])
    memory = engine.take(engine.submit(step_batch(1)))
    gradients = []
    for form in ("index", "lookup"):
        rows = memory.micro(0).rows("a.0")
        rows.grad.zero_()
        for i in range(2):
            micro = memory.micro(i)
            looked_up = (
                micro.lookup("a.0", "a").transpose(0, 1) if form == "lookup" else micro.rows("a.0")[micro.index("a")]
            )
            (looked_up * torch.sin(torch.arange(looked_up.numel()).view_as(looked_up))).sum().backward()
        gradients.append(rows.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["lazy_adam", "rowwise_adagrad"])
def test_a_blocked_step_leaves_every_byte(name: str) -> None:
    stream = HashedStream("a", 11, (2,))
    engine = make_engine([stream], name=name)
    for step in (1, 2):
        memory = engine.take(engine.submit(step_batch(step)))
        run_backward(memory, [stream])
        gradients = engine.return_gradients(memory)
        if step == 1:
            engine.apply(gradients, lr=0.1, step=step)
            before = snapshot(engine)
    assert all(torch.equal(tensor, before[key]) for key, tensor in snapshot(engine).items())


def test_a_working_set_without_gradient_counts_as_zero() -> None:
    engine = make_engine([HashedStream("a", 11, (2, 3))])
    memory = engine.take(engine.submit(step_batch(1)))
    memory.micro(0).rows("a.1").sum().backward()
    gradients = engine.return_gradients(memory)
    assert not gradients.values["a.0"].any() and bool((gradients.values["a.1"] == 1).all())
    assert memory.micro(0).rows("a.1").grad is None


def test_evaluation_has_no_gradients_and_its_own_addresses() -> None:
    engine = make_engine([HashedStream("a", 11, (2,))])
    memory = engine.take(engine.submit(step_batch(3), train=False))
    rows = memory.micro(1).rows("a.0")
    assert not rows.requires_grad and torch.equal(rows, rows_of(engine, "a.0")[:1])
    with pytest.raises(ValueError, match="submitted without train"):
        engine.return_gradients(memory)


def test_calls_in_a_wrong_order_are_refused() -> None:
    stream = HashedStream("a", 11, (2,))
    engine = make_engine([stream], depth=1)
    first, second = engine.submit(step_batch(1)), engine.submit(step_batch(2))
    with pytest.raises(ValueError, match="2 steps are under way; end one before step 3"):
        engine.submit(step_batch(3))
    with pytest.raises(ValueError, match=r"step 2 is not the next of steps \[1, 2\]"):
        engine.take(second)
    memory = engine.take(first)
    with pytest.raises(ValueError, match="step 1 is not over; apply or discard it before step 2"):
        engine.take(second)
    run_backward(memory, [stream])
    gradients = engine.return_gradients(memory)
    with pytest.raises(RuntimeError, match="a slot cannot go from empty to returning"):
        engine.return_gradients(memory)
    evaluation = engine.submit(step_batch(9), train=False)
    engine.apply(gradients, lr=0.1, step=1)
    with pytest.raises(ValueError, match="rows were updated since the evaluation step 9"):
        engine.take(evaluation)
    with pytest.raises(ValueError, match="no step is open"):
        engine.apply(gradients, lr=0.1, step=2)
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="the memory engine is closed"):
        engine.synchronize()


def test_stats_and_usage() -> None:
    stream = HashedStream("a", 1000, (2, 4))
    engine = make_engine([stream])
    assert engine.table_usage() == {"a.0": 0.0, "a.1": 0.0}
    batch = step_batch(1, vocabulary=3, sequences=4)
    addresses = np.concatenate([stream.addresses(micro, slice(0, 6)) for micro in batch.micro_batches])
    unique = len(np.unique(addresses))
    memory = engine.take(engine.submit(batch))
    run_backward(memory, [stream])
    engine.apply(engine.return_gradients(memory), lr=0.1, step=1)
    stats = engine.stats
    assert (stats["lookups"], stats["unique_rows"], stats["unique_ratio"]) == (48, unique, unique / 48)
    assert stats["rows_received"] == 2 * unique and stats["bytes_received"] == stats["bytes_sent"] == 0
    assert stats["touched_rows/a.0"] == stats["touched_rows/a.1"] == unique
    assert stats["stall_seconds"] > stats["plan_seconds"] > 0 and stats["update_seconds"] > 0
    assert engine.table_usage() == {"a.0": unique / 1000, "a.1": unique / 1000}


def test_a_model_without_streams_and_tables_of_another_size() -> None:
    engine = make_engine([])
    memory = engine.take(engine.submit(step_batch(1)))
    assert memory.ticket.plan.micro_batches == 2
    gradients = engine.return_gradients(memory)
    assert gradients.norm_sq(alone) == 0 and engine.stats["unique_ratio"] == 0
    engine.apply(gradients, lr=0.1, step=1)
    stream = HashedStream("a", 8, (2,))
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
    stream = HashedStream("a", 100_003, (4,))
    engine = make_engine([stream], name=name)
    table = engine.tables["a.0"]

    def train(step: int) -> None:
        memory = engine.take(engine.submit(step_batch(step)))
        run_backward(memory, [stream])
        gradients = engine.return_gradients(memory)
        gradients.scale(gradients.norm_sq(alone) ** -0.5)
        engine.apply(gradients, lr=0.1, step=step)

    with LargestAllocation([]):
        train(1)  # the first call compiles kernels, or loads them, and imports what such a mode needs
    tracemalloc.start()
    try:
        with LargestAllocation([*table.rows.arrays.values(), *table.state.arrays.values()]) as largest:
            train(2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 40 lookups of rows of 16 bytes; one byte per row of the table would already be 100 kB.
    assert 0 < largest.bytes < 4096
    assert peak < 100_003
