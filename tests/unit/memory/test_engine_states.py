"""The state machine of prefetching, driven at random: no row lost, none applied twice, no deadlock."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamem.memory.config import MemoryConfig, RowOptimizerConfig
from megamem.memory.engine import MemoryEngine
from megamem.memory.slots import State
from megamem.testing.streams import HashedStream, step_batch

ROWS, WIDTH = 23, 3
SEQUENCE_LENGTH = 6


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A deadlock ends the test process with the stack of every thread."""
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Broken(Exception):
    """What a stage is made to raise."""


def gradient_scale(batch_step: int) -> float:
    return 1.0 + batch_step % 3


class Reference:
    """Synchronous SGD on one dense table: what any schedule of the engine must equal."""

    def __init__(self, engine: MemoryEngine) -> None:
        self.rows = engine.tables["a.0"].read(0, ROWS)["rows"].clone()

    def train(self, batch: Any, stream: HashedStream, lr: float) -> None:
        gradient = torch.zeros_like(self.rows)
        for micro in batch.micro_batches:
            ids = torch.from_numpy(stream.addresses(micro, slice(0, micro.shape[1]))).reshape(-1)
            for row in ids.tolist():
                gradient[row] += self.rows[row] * gradient_scale(batch.step)
        self.rows -= lr * gradient


def run_step(engine: MemoryEngine, ticket: Any, reference: Reference, batch: Any, stream: HashedStream) -> Any:
    """Check the rows of a step against the reference, and return its gradients."""
    memory = engine.take(ticket)
    for i, micro in enumerate(batch.micro_batches):
        view = memory.micro(i)
        ids = torch.from_numpy(stream.addresses(micro, slice(0, micro.shape[1]), train=ticket.train))
        torch.testing.assert_close(view.rows("a.0")[view.index("a")], reference.rows[ids], rtol=0, atol=1e-5)
        if ticket.train:
            rows = view.lookup("a.0", "a")
            (0.5 * gradient_scale(batch.step) * rows.square()).sum().backward()
    if not ticket.train:
        engine.release(memory)
        return None
    return engine.return_gradients(memory)


batches = st.tuples(st.integers(0, 6), st.integers(1, 64))  # sequences (0: an empty step) and vocabulary
steps = st.lists(
    st.tuples(batches, st.sampled_from(["apply", "discard", "apply", "evaluate first"])), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(depth=st.integers(0, 3), script=steps)
def test_any_schedule_equals_synchronous_training(depth: int, script: list[Any]) -> None:
    stream = HashedStream("a", ROWS, (WIDTH,))
    engine = MemoryEngine(
        [stream],
        memory=MemoryConfig(optimizer=RowOptimizerConfig(name="sgd"), prefetch_depth=depth),
        seed=3,
        device="cpu",
    )
    reference = Reference(engine)
    todo = [
        step_batch(number, sequences=sequences, length=SEQUENCE_LENGTH, vocabulary=vocabulary)
        for number, ((sequences, vocabulary), _) in enumerate(script)
    ]
    ahead: list[Any] = []
    applied = 0
    for number, (_, how) in enumerate(script):
        if how == "evaluate first":
            sample = step_batch(100 + number)
            run_step(engine, engine.submit(sample, train=False), reference, sample, stream)
        while len(ahead) <= depth and number + len(ahead) < len(todo):
            ahead.append(engine.submit(todo[number + len(ahead)]))
        gradients = run_step(engine, ahead.pop(0), reference, todo[number], stream)
        if how == "discard":
            engine.discard(gradients)
        else:
            applied += 1
            engine.apply(gradients, lr=0.01, step=applied)
            reference.train(todo[number], stream, 0.01)
        assert engine.stats["stale_rows"] == 0
    torch.testing.assert_close(engine.tables["a.0"].read(0, ROWS)["rows"], reference.rows, rtol=0, atol=1e-5)
    assert all(slot.state is State.EMPTY and not slot.claimed for slot in engine._slots)
    engine.close()


STAGES = ["addresses", "request", "fetch", "patch", "return_gradients", "update"]


def break_stage(engine: MemoryEngine, stage: str, countdown: int) -> None:
    """Let a stage raise at its ``countdown``-th call."""
    owner: Any = {"addresses": engine._streams[0], "update": engine._optimizer}.get(stage, engine._exchange)
    real, left = getattr(owner, stage), [countdown]

    def breaking(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Broken(stage)
        return real(*args, **kwargs)

    setattr(owner, stage, breaking)


@settings(max_examples=60, deadline=None)
@given(
    depth=st.integers(0, 3),
    stage=st.sampled_from(STAGES),
    countdown=st.integers(0, 4),
    shutdown=st.integers(0, 40),
)
def test_errors_and_shutdown_at_any_point_end_in_one_error_and_no_deadlock(
    depth: int, stage: str, countdown: int, shutdown: int
) -> None:
    stream = HashedStream("a", ROWS, (WIDTH,))
    engine = MemoryEngine(
        [stream],
        memory=MemoryConfig(optimizer=RowOptimizerConfig(name="rowwise_adagrad"), prefetch_depth=depth),
        seed=3,
        device="cpu",
    )
    break_stage(engine, stage, countdown)
    calls, error = [0], None

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > shutdown:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    try:
        ahead: list[Any] = []
        for number in range(8):
            while len(ahead) <= depth and number + len(ahead) < 8:
                ahead.append(call(engine.submit, step_batch(number + len(ahead))))
            memory = call(engine.take, ahead.pop(0))
            memory.micro(0).lookup("a.0", "a").sum().backward()
            call(engine.apply, call(engine.return_gradients, memory), lr=0.1, step=number + 1)
        call(engine.synchronize)
    except (Broken, KeyboardInterrupt) as caught:
        error = caught
    if isinstance(error, Broken):
        assert str(error) == stage
        with pytest.raises(Broken, match=stage):
            engine.synchronize()
        with pytest.raises((Broken, ValueError)):
            engine.take(engine.submit(step_batch(50), train=False))
    elif error is None:
        assert stage == "patch" and depth == 0, "eight steps pass through every stage more than four times"
    engine.close()


def test_stale_rows_miss_exactly_the_last_updates_and_are_counted() -> None:
    """With staleness k, step t reads what updates 0 .. t-1-k left."""
    depth, staleness, total = 3, 2, 7
    stream = HashedStream("a", ROWS, (WIDTH,))
    engine = MemoryEngine(
        [stream],
        memory=MemoryConfig(optimizer=RowOptimizerConfig(name="sgd"), prefetch_depth=depth, staleness=staleness),
        seed=3,
        device="cpu",
    )
    history = [engine.tables["a.0"].read(0, ROWS)["rows"].clone()]
    ahead = [engine.submit(step_batch(step)) for step in range(depth + 1)]
    stale = []
    for step in range(total):
        ticket = ahead.pop(0)
        memory = engine.take(ticket)
        engine.synchronize()
        # What was submitted before any update is patched from update `staleness + 1` on.
        seen = history[max(0, step - staleness)]
        assert torch.equal(memory.working_sets["a.0"], seen[torch.from_numpy(ticket.plan.streams["a"].ids)])
        for i in range(2):
            memory.micro(i).lookup("a.0", "a").square().sum().backward()
        gradients = engine.return_gradients(memory)
        stale.append(engine.stats["stale_rows"])
        engine.apply(gradients, lr=0.01, step=step + 1)
        history.append(engine.tables["a.0"].read(0, ROWS)["rows"].clone())
        ahead.append(engine.submit(step_batch(step + depth + 1)))
    assert stale[0] == 0 and all(count > 0 for count in stale[1:])
    engine.close()


def test_no_row_is_applied_twice_when_steps_share_all_rows() -> None:
    """SGD with gradient one moves every row by lr per use: the sum of all moves tells how often each use was applied."""
    stream = HashedStream("a", 5, (1,), k=3)
    engine = MemoryEngine(
        [stream],
        memory=MemoryConfig(optimizer=RowOptimizerConfig(name="sgd"), prefetch_depth=3),
        seed=1,
        device="cpu",
    )
    before = engine.tables["a.0"].read(0, 5)["rows"].clone()
    ahead = [engine.submit(step_batch(step)) for step in range(4)]
    uses = np.zeros(5, dtype=np.int64)
    for step in range(6):
        memory = engine.take(ahead.pop(0))
        for i, micro in enumerate(step_batch(step).micro_batches):
            memory.micro(i).lookup("a.0", "a").sum().backward()
            uses += np.bincount(stream.addresses(micro, slice(0, 6)).reshape(-1), minlength=5)
        engine.apply(engine.return_gradients(memory), lr=1.0, step=step + 1)
        if step + 4 < 6:
            ahead.append(engine.submit(step_batch(step + 4)))
    moved = before - engine.tables["a.0"].read(0, 5)["rows"]
    np.testing.assert_allclose(moved[:, 0].numpy(), uses, rtol=1e-5)
    engine.close()
