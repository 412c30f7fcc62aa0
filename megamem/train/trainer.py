"""The training loop: steps, guards, evaluations, and calls to whoever saves and observes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from megamem.batch import StepBatch, TokenLoader
from megamem.memory.config import MemoryConfig
from megamem.memory.engine import MemoryEngine
from megamem.memory.slots import Ticket
from megamem.memory.step import RowGradients
from megamem.models.router import take_aux_loss, update_router_bias
from megamem.observe.memory import memory_bytes
from megamem.observe.phases import phases
from megamem.parallel.groups import Groups
from megamem.parallel.zero import ZeroEngine
from megamem.train.config import OptimizerConfig, TrainConfig
from megamem.train.control import Request, agree
from megamem.train.guard import LossGuard
from megamem.train.schedule import learning_rate, row_learning_rate
from megamem.train.step import StepLoss, StepRunner


class Observer(Protocol):
    """Who is told what happens; called on every rank, free to do nothing on most of them."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """An optimizer step ended (applied or skipped)."""
        ...

    def evaluation(self, step: int, loss: float, *, blocked: bool) -> None:
        """The validation loss after ``step`` steps, with every memory blocked or not."""
        ...

    def event(self, name: str, step: int, text: str) -> None:
        """Something a person wants to know; ``name`` is one of the journal's event names."""
        ...


@dataclass(slots=True)
class Progress:
    """Counters of a run; what a resume continues from."""

    step: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    evaluations: dict[str, float] = field(default_factory=dict)
    """Named validation losses: ``first``, ``last``, ``last_blocked``."""


@dataclass(slots=True)
class Trainer:
    """Trains one pipeline stage in step with all other ranks."""

    config: TrainConfig
    optimizer: OptimizerConfig
    groups: Groups
    model: torch.nn.Module
    zero: ZeroEngine
    memory: MemoryEngine
    runner: StepRunner
    loader: TokenLoader
    validation: TokenLoader | None
    observer: Observer
    save: Callable[[int], None]
    """Write a checkpoint of the state after this many steps, or begin to: the state may change when it returns."""
    checkpoint_interval: int
    after_step: Callable[[], None] = lambda: None
    """Called after every step: what goes on in the background has its say here."""
    ask: Callable[[], Request] = lambda: Request.NONE
    """What somebody outside wants, asked after every step; one rank that knows is enough."""
    memory_config: MemoryConfig = field(default_factory=MemoryConfig)
    """Prefetch depth, and learning rate and clipping of rows."""
    progress: Progress = field(default_factory=Progress)
    guard: LossGuard = field(init=False)
    _ahead: deque[tuple[StepBatch, Ticket]] = field(default_factory=deque, init=False)
    """Steps whose rows are on their way, the next one first."""
    stopped: bool = field(default=False, init=False)
    """Whether :meth:`run` ended because it was asked to, before the last step."""

    def __post_init__(self) -> None:
        self.guard = LossGuard(self.config)

    def run(self) -> None:
        """Train from ``progress.step`` to ``config.steps``, or until :attr:`ask` says to stop."""
        phases.take()  # what came before is no step's
        if self.progress.step == 0 and self.validation is not None:
            self.evaluate("first")
        saved = self.progress.step
        while self.progress.step < self.config.steps:
            self._step(self.progress.step)
            self.progress.step += 1
            step = self.progress.step
            last = step == self.config.steps
            if self.validation is not None and self._due(step, self.config.eval_interval, last):
                self.evaluate("last")
            with phases("control"):
                request = agree(self.ask())
            if not last and (self._due(step, self.checkpoint_interval, False) or request is not Request.NONE):
                self._save(step)
                saved = step
            self.after_step()
            if request is Request.STOP and not last:
                self.stopped = True
                return
        if self.validation is not None and self.has_memory:
            self.evaluate("last_blocked", blocked=True)
        if saved != self.progress.step:
            self._save(self.progress.step)

    @property
    def has_memory(self) -> bool:
        """Whether any pipeline stage looks rows up; equal on all ranks."""
        flag = torch.tensor([1.0 if self.memory.tables else 0.0])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    @staticmethod
    def _due(step: int, interval: int, last: bool) -> bool:
        return last or bool(interval and step % interval == 0)

    def _save(self, step: int) -> None:
        with phases("checkpoint"):
            self.save(step)

    def _step(self, step: int) -> None:
        began = time.perf_counter()
        phases.step = step + 1
        self._look_ahead(step)
        batch, ticket = self._ahead.popleft()
        with phases("fetch_wait"):
            memory = self.memory.take(ticket)
        self.zero.zero_grad()
        measured = self.runner.run(batch, memory, train=True)
        with phases("exchange"):
            rows = self.memory.return_gradients(memory)
        with phases("dense_reduce"):
            self.zero.reduce_gradients()
            norm, table_norm = self._norms(rows)
        lr = learning_rate(self.optimizer, step, self.config.steps)
        reason = self.guard.refuses(measured.loss, norm if math.isfinite(table_norm) else table_norm)
        if reason is None:
            self._apply(rows, norm, table_norm, lr, step)
        else:
            self.memory.discard(rows)
            self.zero.skip()
            update_router_bias(self.model, discard=True)
            self.progress.skipped_steps += 1
            self.observer.event("skip", step + 1, f"step {step + 1} skipped on all ranks: {reason}")
        self.progress.tokens_seen += batch_tokens(batch) * self.groups.layout.dp
        self._report(step, batch, measured, norm, table_norm, lr, reason is not None, time.perf_counter() - began)

    def _look_ahead(self, step: int) -> None:
        """Submit steps up to ``memory.prefetch_depth`` beyond ``step``, of those that will be trained."""
        last = min(step + self.memory_config.prefetch_depth, self.config.steps - 1)
        for ahead in range(step + len(self._ahead), last + 1):
            with phases("data"):
                batch = self.loader.batch(ahead)
            with phases("plan"):
                self._ahead.append((batch, self.memory.submit(batch)))

    def _norms(self, rows: RowGradients) -> tuple[float, float]:
        """Gradient norm of what ``optimizer.clip_grad`` bounds, and that of the tables; every parameter and row counted once."""
        table_sq = rows.norm_sq(_all_reduce)
        shared = table_sq if self.memory_config.optimizer.clip == "shared" else 0.0
        return math.sqrt(self.zero.grad_norm_sq() + shared), math.sqrt(table_sq)

    def _apply(self, rows: RowGradients, norm: float, table_norm: float, lr: float, step: int) -> None:
        row_optimizer = self.memory_config.optimizer
        coefficient = _clip_coefficient(self.optimizer.clip_grad, norm)
        if row_optimizer.clip == "shared":
            rows.scale(coefficient)
        elif row_optimizer.clip == "own":
            rows.scale(_clip_coefficient(row_optimizer.clip_norm, table_norm))
        with phases("row_update"):
            self.memory.apply(
                rows,
                lr=row_learning_rate(row_optimizer, self.optimizer, step, self.config.steps),
                # Like dense AdamW, rows count the steps that were applied: a skipped one must not age their moments.
                step=step + 1 - self.progress.skipped_steps,
            )
        # Rows are updated and patched in the background meanwhile.
        with phases("dense_step"):
            self.zero.step(lr=lr, clip_coefficient=coefficient)
            update_router_bias(self.model)

    def _report(
        self,
        step: int,
        batch: StepBatch,
        measured: StepLoss,
        norm: float,
        table_norm: float,
        lr: float,
        skipped: bool,
        seconds: float,
    ) -> None:
        tokens = batch_tokens(batch) * self.groups.layout.dp
        metrics: dict[str, Any] = {
            "loss": measured.loss,
            "lr": lr,
            "grad_norm": norm,
            "grad_norm_tables": table_norm,
            "loss_tokens": measured.tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "memory_bytes": memory_bytes(),
            "skipped": int(skipped),
            "aux_loss": take_aux_loss(self.model, self.groups, micro_batches=len(batch.micro_batches)),
            **self.memory.stats,
            # Evaluations and saves count for the step after them: these are all seconds since the last report.
            **{f"seconds/{name}": value for name, value in phases.take().items()},
        }
        self.observer.step(step + 1, metrics)

    def evaluate(self, name: str, *, blocked: bool = False) -> float:
        """Mean validation loss over ``eval_batches`` global batches; with ``blocked`` every memory is switched off."""
        with phases("evaluate"):
            loss = self._validation_loss(blocked)
        self.progress.evaluations[name] = loss
        self.observer.evaluation(self.progress.step, loss, blocked=blocked)
        return loss

    def _validation_loss(self, blocked: bool) -> float:
        assert self.validation is not None
        total, tokens = 0.0, 0
        for index in range(self.config.eval_batches):
            batch = self.validation.batch(index)
            memory = None if blocked else self.memory.take(self.memory.submit(batch, train=False))
            measured = self.runner.run(batch, memory, train=False)
            if memory is not None:
                self.memory.release(memory)
            total += measured.loss * measured.tokens
            tokens += measured.tokens
        return total / max(tokens, 1)


def batch_tokens(batch: StepBatch) -> int:
    """Tokens of a step batch on its data-parallel rank, counted or not."""
    return sum(micro.tokens.size for micro in batch.micro_batches)


def _clip_coefficient(bound: float, norm: float) -> float:
    return min(1.0, bound / (norm + 1e-6)) if bound else 1.0


def _all_reduce(array: np.ndarray, operation: str) -> np.ndarray:
    tensor = torch.from_numpy(array.copy())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
    return tensor.numpy()
