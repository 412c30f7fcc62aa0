"""Slots: where the rows of one step are while they are planned, fetched, used and returned.

::

    EMPTY -> PLANNED -> FETCHING -> READY -> IN_USE -> RETURNING -> EMPTY
                            ^          |        |
                            +- patch --+        +-> EMPTY   (evaluation: nothing to return)

A slot is filled by the engine's worker and used by the training loop, never by both: what separates them is the future of the
job that ends in READY, and on a CUDA device the slot's two fences.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from megamem.memory.buffers import Buffers
from megamem.memory.exchange import Requests
from megamem.memory.fences import Fence
from megamem.memory.lookup import MicroMemory
from megamem.memory.plan import FetchPlan
from megamem.memory.stats import StepStats


class State(Enum):
    """What a slot holds."""

    EMPTY = "empty"
    PLANNED = "planned"
    """Which rows are needed is known."""
    FETCHING = "fetching"
    """Rows are on their way, or being patched."""
    READY = "ready"
    IN_USE = "in use"
    """Forward and backward read the rows and add to their gradient."""
    RETURNING = "returning"
    """Gradients are on their way to the owners."""


TRANSITIONS: dict[State, tuple[State, ...]] = {
    State.EMPTY: (State.PLANNED,),
    State.PLANNED: (State.FETCHING,),
    State.FETCHING: (State.READY,),
    State.READY: (State.FETCHING, State.IN_USE),
    State.IN_USE: (State.RETURNING, State.EMPTY),
    State.RETURNING: (State.EMPTY,),
}


class Slot:
    """Persistent buffers for the rows of one step, and their state."""

    def __init__(self, device: torch.device, gradients: Buffers | None = None) -> None:
        """``gradients``: buffers that all slots share; None for own ones."""
        self.state = State.EMPTY
        self.rows = Buffers(device)
        """Working sets, by table."""
        self.gradients = gradients or Buffers(device)
        """Gradients of the working sets, by table."""
        self.index = Buffers(device)
        """Indices on a CUDA device, by stream and micro-batch."""
        self.staging = Buffers(pinned=device.type == "cuda")
        """What :attr:`index` is copied from."""
        self.filled = Fence(device)
        """Set by the worker when rows and indices are on the device."""
        self.used = Fence(device)
        """Set by the training loop when nothing it has issued later reads them."""
        self.claimed = False
        """Whether a step that was submitted has not given the slot back."""

    @property
    def buffers(self) -> tuple[Buffers, ...]:
        """All that it holds; gradients may be other slots' too."""
        return self.rows, self.gradients, self.index, self.staging

    def move(self, to: State) -> None:
        """Change the state; RuntimeError where the machine has no such transition."""
        if to not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a slot cannot go from {self.state.value} to {to.value}")
        self.state = to

    def release(self) -> None:
        """End of a step: the buffers may be filled again."""
        self.move(State.EMPTY)
        self.claimed = False


@dataclass(slots=True)
class Ticket:
    """A submitted step: what :meth:`~megamem.memory.engine.MemoryEngine.take` redeems."""

    step: int
    train: bool
    slot: Slot
    updates: int
    """Updates that had been given to the engine when this step was submitted."""
    stats: StepStats = field(default_factory=StepStats)
    ready: Future[None] = field(init=False)
    """The last job that fills the slot: its fetch, or its patch."""
    plan: FetchPlan = field(init=False)
    requests: Requests = field(init=False)
    working_sets: dict[str, Tensor] = field(init=False)
    micros: tuple[MicroMemory, ...] = field(init=False)
