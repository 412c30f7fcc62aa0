"""What a rank is doing: one set of marks for heartbeats, the step-time breakdown and the named ranges of traces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAMES = (
    "data",
    "plan",
    "fetch_wait",
    "forward",
    "backward",
    "pipeline_wait",
    "exchange",
    "dense_reduce",
    "dense_step",
    "row_update",
    "checkpoint",
    "evaluate",
    "control",
    "other",
)
"""``data``: reading the step batch. ``plan``: announcing a step's rows; all of addressing and fetching without prefetching.
``fetch_wait``: waiting for rows. ``pipeline_wait``: sending to and waiting for other stages, the bubble. ``exchange``: row
gradients to their owners. ``dense_reduce``: dense gradients and norms over the ranks. ``dense_step``: the dense optimizer.
``row_update``: handing row updates over; all of them without prefetching. ``control``: agreeing with the other ranks whether
to stop. ``other``: what is in none."""


class Phases:
    """Times of nested phases, each without those inside it. One thread, the training loop's, marks them; any may read."""

    def __init__(self) -> None:
        self.step = 0
        """The optimizer step that is under way, or was last."""
        self.sequence = 0
        """Phases that were entered so far: what progress means to a watchdog."""
        self.synchronize: Callable[[], None] | None = None
        """Called at every boundary, where times of an asynchronous device are wanted by phase."""
        self.trace = False
        """Whether phases are also named ranges of torch.profiler."""
        self._stack: list[str] = []
        self._ranges: list[Any] = []
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    @property
    def current(self) -> str:
        """The innermost phase."""
        return self._stack[-1] if self._stack else "other"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Be in phase ``name``, one of :data:`NAMES`."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Begin phase ``name``: for callers that cannot use a ``with``."""
        self._account()
        self._stack.append(name)
        self._ranges.append(_begin_range(name) if self.trace else None)
        self.sequence += 1

    def leave(self) -> None:
        """End the innermost phase."""
        self._account()
        self._stack.pop()
        if (named := self._ranges.pop()) is not None:
            named.__exit__(None, None, None)

    def take(self) -> dict[str, float]:
        """Seconds in every phase since the last call; they add up to the time between the calls."""
        self._account()
        taken, self._seconds = self._seconds, {}
        for name, seconds in taken.items():
            self._totals[name] = self._totals.get(name, 0.0) + seconds
        return taken

    def totals(self) -> dict[str, float]:
        """Seconds in every phase up to the last :meth:`take`."""
        return dict(self._totals)

    def _account(self) -> None:
        if self.synchronize is not None:
            self.synchronize()
        now = time.perf_counter()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self._since = now


def _begin_range(name: str) -> Any:
    import torch

    named = torch.profiler.record_function(name)
    named.__enter__()
    return named


# The last is the whole schedule: what it spends outside the others.
_COMPUTATION = {"forward-compute": "forward", "backward-compute": "backward", "forward-backward": "other"}

phases = Phases()
"""Of this process."""


class ScheduleTimers:
    """megatron-core's ``TransformerConfig.timers``: its pipeline schedules tell when they compute and when they wait."""

    def __init__(self, marks: Phases) -> None:
        self._marks = marks

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        """The timer called ``name``: every one but those of computation is a send or a receive between stages."""
        return _Timer(self._marks, _COMPUTATION.get(name, "pipeline_wait"))


class _Timer:
    def __init__(self, marks: Phases, phase: str) -> None:
        self._marks, self._phase = marks, phase

    def start(self, barrier: bool = False) -> None:
        """Called by megatron-core where it begins."""
        self._marks.enter(self._phase)

    def stop(self, barrier: bool = False) -> None:
        """Called by megatron-core where it ends."""
        self._marks.leave()
