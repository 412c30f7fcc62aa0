"""The memory engine: sharded tables in host memory, and the rows of every optimizer step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.batch import StepBatch
from megamem.memory.config import RowOptimizerConfig
from megamem.memory.exchange import Exchange, Requests
from megamem.memory.optimizers import StateSpec, build_row_optimizer
from megamem.memory.plan import FetchPlan, plan_step
from megamem.memory.stats import StepStats
from megamem.memory.streams import Stream
from megamem.memory.table import OwnedTable
from megamem_kernels.segment_sum import segment_sum

_TOUCHED = StateSpec("touched", torch.uint8, per_element=False)


@dataclass(frozen=True, slots=True)
class MicroMemory:
    """The memory of one micro-batch; its working sets are those of the whole step."""

    _working_sets: dict[str, Tensor]
    _index: dict[str, Tensor]
    _host_index: dict[str, np.ndarray]

    def rows(self, table: str) -> Tensor:
        """The working set of a table, ``[unique, width]`` fp32 on the engine's device: a leaf whose gradient accumulates
        over the micro-batches of the step."""
        return self._working_sets[table]

    def index(self, stream: str) -> Tensor:
        """``[b, s_local, k]`` int64 on the engine's device; ``rows(table)[index(stream)]`` are the addressed rows."""
        return self._index[stream]

    def host_index(self, stream: str) -> np.ndarray:
        """:meth:`index` as a numpy array, readable without waiting for the device."""
        return self._host_index[stream]


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Everything the engine holds of one step on one rank."""

    plan: FetchPlan
    requests: Requests
    working_sets: dict[str, Tensor]
    micros: tuple[MicroMemory, ...]
    stats: StepStats

    def micro(self, i: int) -> MicroMemory:
        """The memory of micro-batch ``i``."""
        return self.micros[i]


@dataclass(frozen=True, slots=True)
class RowGradients:
    """Gradients of the rows that this rank owns: summed over ranks, averaged over data parallelism."""

    rows: dict[str, Tensor]
    """Per table ``[u]`` int64, distinct rows counted from the first owned one, ascending."""
    values: dict[str, Tensor]
    """Per table ``[u, width]`` fp32."""
    stats: StepStats

    def norm_sq(self) -> float:
        """Squared norm of this rank's rows; the sum over the memory group counts every touched row once."""
        return sum(
            float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2 for gradient in self.values.values()
        )

    def scale(self, factor: float) -> None:
        """Multiply all gradients in place."""
        for gradient in self.values.values():
            gradient.mul_(factor)


class MemoryEngine:
    """Owns this rank's share of the tables of its pipeline stage, and moves rows and gradients once per step.

    The calls of one step, each on every rank of the group: :meth:`submit`, :meth:`take`, forward and backward,
    :meth:`return_gradients`, :meth:`apply`. A step that must not count simply leaves out the last one.

    Args:
        streams: Streams of this stage, the same in the same order on every rank of the group.
        optimizer: How touched rows are updated.
        seed: Of the initial rows.
        group: gloo group over which every table is sharded; None for this process alone.
        device: Where working sets live; tables and their state stay in host memory.
        tp_rank: This rank's slice of the sequence.
        tp_size: Slices of the sequence. Every ``group size / tp_size`` ranks hold different sequences.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        optimizer: RowOptimizerConfig,
        seed: int,
        group: dist.ProcessGroup | None,
        device: torch.device | str,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> None:
        self._exchange = Exchange(streams, group)
        self._device = torch.device(device)
        self._tp_rank, self._tp_size = tp_rank, tp_size
        self._data_parallel = self._exchange.size // tp_size
        self._lr_multiplier = optimizer.lr_multiplier
        self._optimizer = build_row_optimizer(optimizer)
        self._submitted: deque[tuple[FetchPlan, StepStats]] = deque()
        self._stats = StepStats()
        self.tables: dict[str, OwnedTable] = {}
        for stream in self._exchange.streams:
            for spec in stream.tables:
                if spec.name in self.tables or spec.rows != stream.rows:
                    raise ValueError(
                        f"table {spec.name} appears twice or is not of the {stream.rows} rows of {stream.name}"
                    )
                table = OwnedTable.create(spec, owners=self._exchange.size, owner=self._exchange.rank, seed=seed)
                table.state = {state.name: state.allocate(table) for state in (*self._optimizer.state, _TOUCHED)}
                self.tables[spec.name] = table

    def submit(self, batch: StepBatch, *, train: bool = True) -> None:
        """Announce a step; its rows are read when it is taken, after every update before. Without ``train`` the working
        sets have no gradient, and streams address rows as at evaluation."""
        stats = StepStats()
        with stats.timed("plan_seconds", "stall_seconds"):
            plan = plan_step(
                batch,
                self._exchange.streams,
                owners=self._exchange.size,
                tp_rank=self._tp_rank,
                tp_size=self._tp_size,
                train=train,
            )
        stats.lookups = sum(stream.lookups for stream in plan.streams.values())
        stats.unique_rows = sum(len(stream.ids) for stream in plan.streams.values())
        self._submitted.append((plan, stats))

    def take(self, step: int) -> StepMemory:
        """The rows of the submitted step ``step``; steps are taken in the order of their submission. Collective.

        Raises:
            ValueError: ``step`` is not the next submitted one.
            ExchangeError: what another rank asked for is not what was agreed.
        """
        if not self._submitted or self._submitted[0][0].step != step:
            waiting = [plan.step for plan, _ in self._submitted]
            raise ValueError(f"step {step} is not the next of the submitted steps {waiting}")
        plan, stats = self._submitted.popleft()
        with stats.timed("stall_seconds"):
            host_rows, requests = self._exchange.fetch(plan, self.tables, stats)
            working_sets = {name: self._to_device(rows).requires_grad_(plan.train) for name, rows in host_rows.items()}
            micros = self._micros(plan, working_sets)
        self._stats = stats
        return StepMemory(plan, requests, working_sets, micros, stats)

    def return_gradients(self, memory: StepMemory) -> RowGradients:
        """Send the gradients of a step's working sets to the owners of the rows. Collective.

        Contributions to a row are added in rank order, so that the result is the same bit for bit in every run, and
        divided by the data-parallel size. A working set without a gradient counts as zero. The gradients of ``memory``
        are released.

        Raises:
            ValueError: ``memory`` was submitted without ``train``.
        """
        if not memory.plan.train:
            raise ValueError(f"step {memory.plan.step} was submitted without train and has no gradients")
        with memory.stats.timed("stall_seconds"):
            gradients = {
                name: rows.grad.to("cpu") for name, rows in memory.working_sets.items() if rows.grad is not None
            }
            arrived = self._exchange.return_gradients(memory.plan, memory.requests, gradients, memory.stats)
            rows, values = {}, {}
            for stream in self._exchange.streams:
                unique, segment = torch.unique(torch.cat(memory.requests.ids[stream.name]), return_inverse=True)
                for spec in stream.tables:
                    summed = segment_sum(arrived.pop(spec.name), segment, len(unique))
                    rows[spec.name], values[spec.name] = unique, summed.div_(self._data_parallel)
                    memory.stats.touched_rows[spec.name] = len(unique)
        for working_set in memory.working_sets.values():
            working_set.grad = None
        return RowGradients(rows, values, memory.stats)

    def apply(self, gradients: RowGradients, *, lr: float, step: int) -> None:
        """Update the touched rows that this rank owns.

        Args:
            gradients: From :meth:`return_gradients`, clipped.
            lr: Dense learning rate; rows take ``memory.optimizer.lr_multiplier`` times as much.
            step: Number of this optimizer step, counted from 1, skipped ones left out.
        """
        with gradients.stats.timed("update_seconds"):
            for name, gradient in gradients.values.items():
                table, index = self.tables[name], gradients.rows[name]
                self._optimizer.update(table, index, gradient, lr=lr * self._lr_multiplier, step=step)
                table.state[_TOUCHED.name].index_fill_(0, index, 1)

    @property
    def stats(self) -> dict[str, float]:
        """Numbers of the step that was taken last, see :class:`~megamem.memory.stats.StepStats`."""
        return self._stats.as_dict()

    def table_usage(self) -> dict[str, float]:
        """Per table, the fraction of the rows owned by this rank that were ever updated."""
        return {name: table.usage for name, table in self.tables.items()}

    def close(self) -> None:
        """Forget submitted steps."""
        self._submitted.clear()

    def _micros(self, plan: FetchPlan, working_sets: dict[str, Tensor]) -> tuple[MicroMemory, ...]:
        host = [{name: s.inverse[i] for name, s in plan.streams.items()} for i in range(plan.micro_batches)]
        return tuple(
            MicroMemory(
                working_sets,
                {name: self._to_device(torch.from_numpy(inverse)) for name, inverse in index.items()},
                index,
            )
            for index in host
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return tensor.detach()
        return tensor.pin_memory().to(self._device, non_blocking=True)
