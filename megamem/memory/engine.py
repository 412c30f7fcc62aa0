"""The memory engine: sharded tables and their optimizer state, and the rows of every optimizer step, fetched ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.batch import StepBatch
from megamem.memory.access import AccessTrace
from megamem.memory.buffers import Buffers
from megamem.memory.config import MemoryConfig
from megamem.memory.exchange import Exchange
from megamem.memory.fences import Fence, SideStream
from megamem.memory.host_gather import reads_through_bus
from megamem.memory.links import MemoryLinks
from megamem.memory.optimizers import build_row_optimizer
from megamem.memory.placement import Placement
from megamem.memory.plan import plan_step
from megamem.memory.slots import Slot, State, Ticket
from megamem.memory.spec import TableSpec, disk_bytes
from megamem.memory.stats import StepStats
from megamem.memory.step import MicroMemory, RowGradients, StepMemory
from megamem.memory.streams import Stream
from megamem.memory.table import OwnedTable
from megamem.memory.tiers.base import record_bytes
from megamem.memory.tiers.resources import TierResources
from megamem.memory.worker import Worker


class MemoryEngine:
    """Owns this rank's share of the tables of its pipeline stage, and moves rows and gradients once per step.

    The calls of one step, each on every rank of the group and in the same order: :meth:`submit`, up to
    ``memory.prefetch_depth`` steps ahead of :meth:`take`; forward and backward; :meth:`return_gradients`; then
    :meth:`apply`, or :meth:`discard` for a step that must not count. An evaluation is submitted, taken and released at once.
    ``docs/memory-engine.md`` has the invariants.

    Args:
        streams: Streams of this stage, the same in the same order on every rank of the group.
        memory: Storage, placement, prefetching and row optimizer.
        seed: Of the initial rows and of stochastic rounding.
        links: Groups of the ranks over which every table is sharded; None for this process alone.
        device: Where working sets live.
        disk_root: Directory of the disk tier's files on this node, the same for all its ranks; None where no table needs it.
        resume: Label of the checkpoint that will be loaded with its optimizer state: disk files that were committed under it
            are taken over.
        slice_index: This rank's slice of every sequence.
        slices: Slices of every sequence, one for each rank that shares it.
        averaged_over: Ranks over which dense gradients are averaged: the sum of the gradients of a row is divided by as many.
            None for group size / ``slices``, the number of ranks that hold different sequences.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        memory: MemoryConfig,
        seed: int,
        links: MemoryLinks | None = None,
        device: torch.device | str,
        disk_root: Path | None = None,
        resume: str = "",
        slice_index: int = 0,
        slices: int = 1,
        averaged_over: int | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._slice_index, self._slices = slice_index, slices
        self._staleness = memory.staleness
        self.links = links = links or MemoryLinks()
        self._group = group = links.group
        self._streams = tuple(streams)
        self._optimizer = build_row_optimizer(memory.optimizer)
        self._placements = {stream.name: Placement(memory.placement, stream.rows) for stream in self._streams}
        owner, owners = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self._averaged_over = averaged_over or owners // slices
        shares: list[dict[str, Any]] = [
            {
                "spec": spec,
                "owners": owners,
                "owner": owner,
                "storage": memory.storage_of(spec.name),
                "state_fields": self._optimizer.state_fields(spec.width),
            }
            for spec in self._specs()
        ]
        resources = TierResources(
            device=self._device,
            host_memory=memory.host_memory,
            disk=memory.disk,
            disk_root=disk_root,
            disk_bytes=sum(disk_bytes(**share) for share in shares),
            resume=resume,
        )
        self._tables: dict[str, OwnedTable] = {}
        try:
            for share in shares:
                spec = share["spec"]
                self._tables[spec.name] = OwnedTable.create(
                    **share,
                    seed=seed,
                    placement=Placement(memory.placement, spec.rows),
                    resources=resources,
                )
            self._exchange = Exchange(
                self._streams,
                self._tables,
                group,
                row_group=links.row_group,
                wire_device=links.wire_device,
                verify=memory.verify,
                nodes=links.nodes,
                uva=reads_through_bus(memory, list(self._tables.values()), self._device),
            )
        except BaseException:
            self._close_tables()
            raise
        self._traces = {stream.name: AccessTrace(stream.rows) for stream in self._streams}
        self._worker = Worker(threaded=memory.prefetch_depth > 0)
        self._side = SideStream(self._device)
        self._clipped = Fence(self._device)
        # With stale rows a step may begin while the update before it still reads its gradients.
        shared = Buffers(self._device) if memory.staleness == 0 else None
        self._slots = [Slot(self._device, shared) for _ in range(memory.prefetch_depth + 1)]
        self._ahead: deque[Ticket] = deque()
        """Training steps that were submitted and not taken, in order."""
        self._open: int | None = None
        """The training step that was taken and neither applied nor discarded."""
        self._updates = 0
        self._written: dict[str, float] = {"update_seconds": 0.0}
        self._stats = StepStats()

    def submit(self, batch: StepBatch, *, train: bool = True) -> Ticket:
        """Announce a step, whose rows are then planned and fetched behind the training loop's back.

        Without ``train`` the working sets have no gradient, and streams address rows as at evaluation.

        Raises:
            ValueError: ``memory.prefetch_depth + 1`` steps are under way already.
        """
        slot = next((slot for slot in self._slots if not slot.claimed), None)
        if slot is None:
            raise ValueError(f"{len(self._slots)} steps are under way; end one before step {batch.step} is submitted")
        slot.claimed = True
        ticket = Ticket(batch.step, train, slot, self._updates)
        with ticket.stats.timed("stall_seconds"):  # without prefetching, all of it happens here
            ticket.ready = self._worker.submit(partial(self._fetch, ticket, batch))
        if train:
            self._ahead.append(ticket)
        return ticket

    def take(self, ticket: Ticket) -> StepMemory:
        """The rows of a submitted step, with every update that came before it (``memory.staleness`` fewer).

        Raises:
            ValueError: an earlier training step was not taken, or is neither applied nor discarded; or rows of an evaluation
                were updated since its submission.
            MegamemError: what went wrong in the background, on this rank or another.
        """
        if ticket.train and (not self._ahead or self._ahead[0] is not ticket):
            raise ValueError(f"step {ticket.step} is not the next of steps {[ahead.step for ahead in self._ahead]}")
        if ticket.train and self._open is not None:
            raise ValueError(f"step {self._open} is not over; apply or discard it before step {ticket.step} is taken")
        if not ticket.train and ticket.updates != self._updates:
            raise ValueError(f"rows were updated since the evaluation step {ticket.step} was submitted")
        with ticket.stats.timed("stall_seconds"):
            ticket.ready.result()
        slot = ticket.slot
        slot.filled.wait()
        slot.move(State.IN_USE)
        if ticket.train:
            self._ahead.popleft()
            self._open = ticket.step
            for name, rows in ticket.working_sets.items():
                gradient = slot.gradients.get(name, tuple(rows.shape), rows.dtype)
                rows.requires_grad_().grad = gradient.zero_()
        self._stats = ticket.stats
        return StepMemory(ticket)

    def release(self, memory: StepMemory) -> None:
        """End an evaluation step: its rows are not read any more."""
        memory.ticket.slot.used.set()
        memory.ticket.slot.release()

    def return_gradients(self, memory: StepMemory) -> RowGradients:
        """Send the gradients of a step's working sets to the owners of the rows. Collective.

        Contributions to a row are added in rank order, so that the result is the same bit for bit in every run, and
        divided by ``averaged_over``. The rows of ``memory`` are gone afterwards.

        Raises:
            ValueError: ``memory`` was submitted without ``train``.
            MegamemError: what went wrong in the background, on this rank or another.
        """
        ticket = memory.ticket
        if not ticket.train:
            raise ValueError(f"step {ticket.step} was submitted without train and has no gradients")
        ticket.slot.move(State.RETURNING)
        ticket.slot.used.set()
        with ticket.stats.timed("stall_seconds"):
            gradients = self._worker.submit(partial(self._return, ticket)).result()
        for rows in ticket.working_sets.values():
            rows.grad = None
        return gradients

    def apply(self, gradients: RowGradients, *, lr: float, step: int) -> None:
        """Update the touched rows that this rank owns, behind the training loop's back, and patch what was fetched ahead.

        Args:
            gradients: From :meth:`return_gradients`, clipped.
            lr: Learning rate of rows.
            step: Number of this optimizer step, counted from 1, skipped ones left out.
        """
        self._close_step()
        self._updates += 1
        self._clipped.set()
        self._worker.submit(partial(self._update, gradients, tuple(self._ahead), lr, step))
        self._patch_next()

    def discard(self, gradients: RowGradients) -> None:
        """End a step that must not count: ``gradients`` are forgotten."""
        self._close_step()
        gradients.values.clear()
        self._patch_next()

    def synchronize(self) -> None:
        """Return when everything submitted so far is done, and tables hold every update; raises what went wrong."""
        self._worker.wait()
        self._side.synchronize()

    @property
    def tables(self) -> dict[str, OwnedTable]:
        """The owned tables, up to date; to be read before the next step is submitted."""
        self.synchronize()
        return self._tables

    @property
    def stats(self) -> dict[str, float]:
        """Numbers of the step that was taken last, see :class:`~megamem.memory.stats.StepStats`; the time of the row optimizer
        and what it has written are those of the last update that has ended."""
        return {**self._stats.as_dict(), **self._written}

    def access(self) -> dict[str, dict[str, object]]:
        """Per stream, how this rank's training steps read it, see :meth:`~megamem.memory.access.AccessTrace.summary`."""
        self.synchronize()
        return {name: trace.summary() for name, trace in self._traces.items()}

    def table_usage(self) -> dict[str, float]:
        """Per table, the fraction of the rows owned by this rank that were ever updated."""
        return {name: table.usage for name, table in self.tables.items()}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the persistent buffers of working sets, their gradients and indices, on any device."""
        kept = {id(buffers): buffers for slot in self._slots for buffers in slot.buffers}
        return sum(buffers.nbytes for buffers in kept.values())

    def close(self) -> None:
        """Forget submitted steps and release tables and their files. Idempotent."""
        self._worker.close()
        self._ahead.clear()
        self._close_tables()

    def _specs(self) -> list[TableSpec]:
        specs = {}
        for stream in self._streams:
            for spec in stream.tables:
                if spec.name in specs or spec.rows != stream.rows:
                    raise ValueError(
                        f"table {spec.name} appears twice or is not of the {stream.rows} rows of {stream.name}"
                    )
                specs[spec.name] = spec
        return list(specs.values())

    def _close_tables(self) -> None:
        for table in self._tables.values():
            table.close()

    def _fetch(self, ticket: Ticket, batch: StepBatch) -> None:
        slot, stats = ticket.slot, ticket.stats
        with stats.timed("plan_seconds"):
            ticket.plan = plan_step(
                batch,
                self._streams,
                self._placements,
                owners=self._exchange.size,
                slice_index=self._slice_index,
                slices=self._slices,
                train=ticket.train,
            )
            stats.lookups = sum(stream.lookups for stream in ticket.plan.streams.values())
            stats.unique_rows = sum(len(stream.ids) for stream in ticket.plan.streams.values())
            if ticket.train:
                self._trace(ticket)
        slot.move(State.PLANNED)
        slot.move(State.FETCHING)
        with stats.timed("fetch_seconds"), self._side.use():
            slot.used.synchronize()
            ticket.requests = self._exchange.request(ticket.plan, stats)
            ticket.working_sets = {
                spec.name: slot.rows.get(
                    spec.name, (len(ticket.plan.streams[stream.name].ids), spec.width), torch.float32
                )
                for stream in self._streams
                for spec in stream.tables
            }
            self._exchange.fetch(ticket.plan, ticket.requests, ticket.working_sets, stats)
            ticket.micros = self._micros(ticket)
            slot.filled.set()
        slot.move(State.READY)

    def _trace(self, ticket: Ticket) -> None:
        for name, plan in ticket.plan.streams.items():
            counts = np.zeros(len(plan.ids), dtype=np.int64)
            for inverse in plan.inverse:
                counts += np.bincount(inverse.reshape(-1), minlength=len(plan.ids))
            self._traces[name].record(plan.ids, counts)

    def _close_step(self) -> None:
        if self._open is None:
            raise ValueError("no step is open: its gradients were applied or discarded before")
        self._open = None

    def _patch_next(self) -> None:
        """Bring rows that were fetched ahead up to date: those of the step that may miss only the next updates."""
        if len(self._ahead) > self._staleness:
            ticket = self._ahead[self._staleness]
            ticket.ready = self._worker.submit(partial(self._patch, ticket))

    def _patch(self, ticket: Ticket) -> None:
        ticket.slot.move(State.FETCHING)
        with ticket.stats.timed("fetch_seconds"), self._side.use():
            ticket.stats.patched_rows += self._exchange.patch(
                ticket.plan, ticket.requests, ticket.working_sets, ticket.stats
            )
            ticket.slot.filled.set()
        ticket.slot.move(State.READY)

    def _return(self, ticket: Ticket) -> RowGradients:
        gradients = {name: rows.grad for name, rows in ticket.working_sets.items() if rows.grad is not None}
        with self._side.use():
            ticket.slot.used.wait()
            arrived = self._exchange.return_gradients(ticket.plan, ticket.requests, gradients, ticket.stats)
            self._side.synchronize()
        ticket.stats.stale_rows = ticket.requests.dirty
        for table in self._tables.values():
            for kind, size in table.resident_bytes().items():
                ticket.stats.resident_bytes[kind] = ticket.stats.resident_bytes.get(kind, 0) + size
        rows, values = {}, {}
        for name, (touched, summed) in arrived.items():
            rows[name], values[name] = touched, summed.div_(self._averaged_over)
            ticket.stats.touched_rows[name] = len(touched)
        ticket.slot.release()
        return RowGradients(rows, values, ticket.stats)

    def _update(self, gradients: RowGradients, ahead: tuple[Ticket, ...], lr: float, step: int) -> None:
        began = time.perf_counter()
        written = StepStats()
        with self._side.use():
            self._clipped.wait()
            self._update_tables(gradients, written, lr, step)
        for stream in self._streams:
            # Tables of a stream are touched together, because they share addresses.
            for ticket in ahead:
                ticket.requests.mark(stream.name, gradients.rows[stream.tables[0].name])
        written.update_seconds = time.perf_counter() - began
        # Assigned at once: the training loop may read it at any time.
        self._written = {
            key: value for key, value in written.as_dict().items() if "written/" in key or key == "update_seconds"
        }

    def _update_tables(self, gradients: RowGradients, written: StepStats, lr: float, step: int) -> None:
        for stream in self._streams:
            for spec in stream.tables:
                table, touched = self._tables[spec.name], gradients.rows[spec.name]
                self._optimizer.update(table, touched, gradients.values[spec.name], lr=lr, step=step, group=self._group)
                for store, tier in ((table.rows, table.storage.tier), (table.state, table.storage.tier_of_state)):
                    nbytes = len(touched) * record_bytes(store.fields)
                    written.count_io(tier, "written", rows=len(touched), nbytes=nbytes)

    def _micros(self, ticket: Ticket) -> tuple[MicroMemory, ...]:
        plan = ticket.plan
        micros = []
        for i in range(plan.micro_batches):
            host = {name: stream.inverse[i] for name, stream in plan.streams.items()}
            index = {name: self._to_device(ticket.slot, f"{name}/{i}", inverse) for name, inverse in host.items()}
            micros.append(MicroMemory(ticket.working_sets, index, host))
        return tuple(micros)

    def _to_device(self, slot: Slot, name: str, index: np.ndarray) -> Tensor:
        host = torch.from_numpy(index)
        if self._device.type == "cpu":
            return host
        staged = slot.staging.get(name, tuple(host.shape), host.dtype)
        staged.copy_(host)
        return slot.index.get(name, tuple(host.shape), host.dtype).copy_(staged, non_blocking=True)
