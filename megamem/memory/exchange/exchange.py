"""The four exchanges of a step. Each is one all-to-all at every hop, over all streams and tables.

Between the ranks of a memory group there is one hop: everyone to the owners. Over nodes there are two. Within a node, local rank
``j`` is asked for the rows of all owners of local rank ``j`` on any node; it asks each of them once for what its node needs, and
relays. Rows come back in storage format and are dequantised where they are used. Gradients are summed at the end of each hop in
the order of its ranks: over nodes the order of additions, and with it the last bits, differs from that of a single hop.

Messages are laid out per peer, stream, table and field, rows in ascending position. Whatever arrives from another rank is
validated before it is used as an index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.errors import ExchangeError
from megamem.memory.exchange.hop import CPU, HINT, Counts, Hop, Workspace, build_hops
from megamem.memory.exchange.ids import admit
from megamem.memory.exchange.message import Form, Section, id_field
from megamem.memory.exchange.nodes import Link, NodeLayout
from megamem.memory.exchange.requests import Order, Requests, StreamRequest
from megamem.memory.exchange.rows import Answer, RelayedRows, Sink, Source, StoredRows, WorkingSets
from megamem.memory.plan import FetchPlan
from megamem.memory.stats import StepStats
from megamem.memory.table import OwnedTable
from megamem.parallel.layout import rows_per_owner
from megamem_kernels.formats import ROWS, Field
from megamem_kernels.segment_sum import segment_sum

if TYPE_CHECKING:
    from megamem.memory.streams import Stream


class Exchange:
    """The exchanges of a fixed list of streams. Of a step it holds nothing: several steps' requests may be open at a time.

    All calls come from one thread; those that are collective are made by every rank of the group in the same order. Between
    steps buffers persist, which grow to the largest messages.

    Args:
        streams: The same streams in the same order on every rank.
        tables: This rank's part of their tables.
        group: A gloo group, whose rank ``i`` owns the ``i``-th range of positions; None for this process alone.
        row_group: Group of the same ranks that carries rows and gradients in place of ``group``.
        wire_device: Where the backend of the row groups wants its messages.
        verify: Checksums on nothing, on counts, ids and patches, or on rows and gradients too.
        nodes: How the ranks of ``group`` are spread over nodes, to exchange in two hops.
        uva: Rows of this rank's own that are wanted on a CUDA device are read there by a kernel, through the bus; otherwise the
            CPU gathers them and the result is copied.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        tables: Mapping[str, OwnedTable],
        group: dist.ProcessGroup | None,
        *,
        row_group: dist.ProcessGroup | None = None,
        wire_device: torch.device | str = CPU,
        verify: Literal["off", "ids", "full"] = "ids",
        nodes: NodeLayout | None = None,
        uva: bool = False,
    ) -> None:
        self.streams = tuple(streams)
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self._names = [stream.name for stream in self.streams]
        self._tables = tables
        self._workspace = Workspace()
        self._uva = uva
        self._checked, self._rows_checked = verify != "off", verify == "full"
        devices = {tables[spec.name].rows.arrays[ROWS].device for stream in self.streams for spec in stream.tables}
        self._device = devices.pop() if len(devices) == 1 else CPU
        self._hops = build_hops(
            self.rank,
            self.size if self.streams else 0,
            Link(group, row_group),
            nodes,
            workspace=self._workspace,
            store_device=self._device,
            wire_device=torch.device(wire_device),
            checked=self._checked,
        )

    def request(self, plan: FetchPlan, stats: StepStats) -> Requests:
        """Ask the owners for the rows of ``plan``, without moving any yet. Collective.

        Raises:
            ExchangeError: a rank is elsewhere or broke off, or asks for rows that this rank does not own.
        """
        wanted = {name: stream.ids for name, stream in plan.streams.items()}
        counts: dict[str, Sequence[int]] = {name: stream.counts for name, stream in plan.streams.items()}
        hops: list[dict[str, StreamRequest]] = []
        for level in range(len(self._hops)):
            if level:
                wanted = {name: request.distinct for name, request in hops[-1].items()}
                counts = {s.name: self._hops[level].counts(wanted[s.name], self._share(s)) for s in self.streams}
            hops.append(self._ask(self._hops[level], plan.step, wanted, counts, stats))
        return Requests(tuple(hops), {stream.name: len(stream.tables) for stream in self.streams})

    def fetch(self, plan: FetchPlan, requests: Requests, out: Mapping[str, Tensor], stats: StepStats) -> None:
        """Bring the rows of ``plan`` as they are now. Collective.

        Args:
            plan: Of the step.
            requests: What :meth:`request` returned for it.
            out: Per table ``[unique, width]`` fp32, overwritten in the order of the plan's ids; on any device.
            stats: Gets bytes and rows.

        Raises:
            ExchangeError: something arrives otherwise than it was sent, or another rank broke off.
        """
        sink = WorkingSets(out, self._workspace)
        self._bring(0, plan.step, requests, sink, stats, patch=False)
        stats.rows_received += sink.rows

    def patch(self, plan: FetchPlan, requests: Requests, out: Mapping[str, Tensor], stats: StepStats) -> int:
        """Bring again those rows of ``plan`` that their owners have marked since they were brought, and clear the marks.
        Collective; arguments and errors as for :meth:`fetch`.

        Returns:
            Rows of all tables that were overwritten in ``out``.
        """
        sink = WorkingSets(out, self._workspace)
        self._bring(0, plan.step, requests, sink, stats, patch=True)
        requests.marks.clear()
        return sink.rows

    def return_gradients(
        self, plan: FetchPlan, requests: Requests, gradients: Mapping[str, Tensor], stats: StepStats
    ) -> dict[str, tuple[np.ndarray, Tensor]]:
        """Send working-set gradients to the owners of the rows. Collective; errors as for :meth:`fetch`.

        Args:
            plan: Of the step.
            requests: What :meth:`request` returned for it.
            gradients: Per table ``[unique, width]`` fp32, contiguous, in the order of the plan's ids; a missing table counts
                as zero.
            stats: Gets the bytes.

        Returns:
            Per table the owned rows that any rank asked for, ``[u]`` int64 ascending, and the sums of their gradients over the
            ranks, ``[u, width]`` fp32 where the rows are: added in rank order, the same bits in every run. They are valid until
            gradients are returned again; a process alone gets the tensors of ``gradients`` themselves.
        """
        sums = dict(gradients)
        for stream in self.streams:
            for spec in stream.tables:
                if spec.name not in sums:
                    sums[spec.name] = torch.zeros(len(plan.streams[stream.name].ids), spec.width, device=self._device)
        for level in range(len(self._hops)):
            sums = self._send_back(level, plan.step, requests.hops[level], sums, stats)
        touched = {stream.name: requests.hops[-1][stream.name].distinct for stream in self.streams}
        return {spec.name: (touched[stream.name], sums[spec.name]) for stream in self.streams for spec in stream.tables}

    def _ask(
        self,
        hop: Hop,
        step: int,
        wanted: Mapping[str, np.ndarray],
        counts: Mapping[str, Sequence[int]],
        stats: StepStats,
    ) -> dict[str, StreamRequest]:
        """Exchange ids over one hop. ``wanted``: by stream ascending positions; ``counts``: how many lie in each block."""
        cuts = [hop.cut(wanted[s.name], counts[s.name], self._share(s)) for s in self.streams]
        limits = [hop.limit(hop.rank, stream.rows, self.size) for stream in self.streams]
        outgoing = [[len(ids[peer]) for _, ids in cuts] for peer in hop.peers]
        incoming = hop.swap_counts("request", step, self._names, outgoing, [limits] * len(hop.peers), stats)

        def fill(peer: int, blocks: list[list[Tensor]]) -> None:
            for (_, ids), (block,) in zip(cuts, blocks, strict=True):
                block.copy_(torch.from_numpy(ids[peer]))

        fields = [id_field(max(hop.limit(peer, s.rows, self.size) for peer in hop.peers)) for s in self.streams]
        arrived = hop.swap(
            "row ids", step, self._form([(f,) for f in fields], self._checked), outgoing, incoming, fill, stats
        )
        requests = {}
        for i, (stream, (orders, ids), limit) in enumerate(zip(self.streams, cuts, limits, strict=True)):
            asked = [
                ids[peer] if peer == hop.rank else self._admitted(hop, peer, step, stream, arrived[peer][i][0], limit)
                for peer in hop.peers
            ]
            requests[stream.name] = StreamRequest(orders, asked, limit)
        return requests

    def _admitted(self, hop: Hop, peer: int, step: int, stream: Stream, ids: Tensor, limit: int) -> np.ndarray:
        admitted = np.empty(len(ids), dtype=np.int64)
        bad = admit(ids.numpy(), limit, admitted)
        if bad >= 0:
            raise ExchangeError(
                f"rank {hop.members[peer]} of the memory group sent rank {self.rank} in step {step} row {int(ids[bad])} of "
                f"stream {stream.name}, which is repeated, out of order or not one of the {limit} rows there; {HINT}"
            )
        return admitted

    def _share(self, stream: Stream) -> int:
        return rows_per_owner(stream.rows, self.size)

    def _bring(self, level: int, step: int, requests: Requests, sink: Sink, stats: StepStats, *, patch: bool) -> None:
        """Fill ``sink`` with the rows that this rank asked for at one hop, all of them or the marked ones, and serve others."""
        if not self._hops:
            return
        hop, asked = self._hops[level], requests.hops[level]
        source: Source
        if level + 1 == len(self._hops):
            source = StoredRows(self._tables, requests.marks if patch else None, self._workspace, stats, uva=self._uva)
        else:
            lengths = {name: len(request.distinct) for name, request in asked.items()} if patch else None
            fields = {s.name: {spec.name: self._fields(spec.name) for spec in s.tables} for s in self.streams}
            source = relay = RelayedRows(fields, lengths, self._workspace, self._device)
            self._bring(level + 1, step, requests, relay, stats, patch=patch)
        answers = {name: source.answers(name, request) for name, request in asked.items()}
        outgoing = [[len(answers[name][peer].index) for name in self._names] for peer in hop.peers]
        incoming: Counts = [[asked[name].wanted(peer) for name in self._names] for peer in hop.peers]
        form = self._form(
            [[f for spec in s.tables for f in self._fields(spec.name)] for s in self.streams], self._rows_checked
        )
        if patch:
            # Ranks know what they asked for, not what has changed since.
            wanted = incoming
            incoming = hop.swap_counts("patch", step, self._names, outgoing, wanted, stats)
            form = self._form([(id_field(0), *section.fields) for section in form.sections], self._checked)

        def fill(peer: int, blocks: list[list[Tensor]]) -> None:
            for stream, section in zip(self.streams, blocks, strict=True):
                answer = answers[stream.name][peer]
                if answer.places is not None:
                    section[0].copy_(torch.from_numpy(answer.places))
                for name, rows in self._by_table(stream, section).items():
                    source.store(name, answer.index, rows)

        what = "patches" if patch else "rows"
        arrived = hop.swap(what, step, form, outgoing, incoming, fill, stats, rows_to=sink.device)
        for name, counts in zip(self._names, zip(*incoming, strict=True), strict=True):
            sink.begin(name, sum(counts))
        for peer in hop.peers:
            for i, stream in enumerate(self.streams):
                order, count = asked[stream.name].orders[peer], incoming[peer][i]
                if peer == hop.rank:
                    self._take_own(stream, sink, order, answers[stream.name][peer], source)
                    continue
                section = arrived[peer][i]
                if patch:
                    limit = asked[stream.name].wanted(peer)
                    order = _at(order, self._admitted(hop, peer, step, stream, section[0].cpu(), limit))
                where = sink.locate(stream.name, order, count)
                for name, rows in self._by_table(stream, section).items():
                    sink.put(name, where, rows)

    def _take_own(self, stream: Stream, sink: Sink, order: Order, answer: Answer, source: Source) -> None:
        """What this rank would send itself at a hop goes straight from the source to the sink."""
        where = sink.locate(stream.name, _at(order, answer.places), len(answer.index))
        for spec in stream.tables:
            sink.pull(spec.name, where, source, answer.index)

    def _send_back(
        self,
        level: int,
        step: int,
        asked: Mapping[str, StreamRequest],
        gradients: Mapping[str, Tensor],
        stats: StepStats,
    ) -> dict[str, Tensor]:
        """Send gradients over one hop and add up what arrives: per table ``[distinct, width]``."""
        hop = self._hops[level]
        outgoing = [[asked[name].wanted(peer) for name in self._names] for peer in hop.peers]
        incoming = [[len(asked[name].asked[peer]) for name in self._names] for peer in hop.peers]
        form = self._form(
            [[Field(spec.name, torch.float32, (spec.width,)) for spec in s.tables] for s in self.streams],
            self._rows_checked,
        )

        def fill(peer: int, blocks: list[list[Tensor]]) -> None:
            for stream, section in zip(self.streams, blocks, strict=True):
                order = asked[stream.name].orders[peer]
                for spec, block in zip(stream.tables, section, strict=True):
                    block.copy_(gradients[spec.name][order])

        arrived = hop.swap("gradients", step, form, outgoing, incoming, fill, stats, rows_to=self._device)
        sums = {}
        for i, stream in enumerate(self.streams):
            request = asked[stream.name]
            for j, spec in enumerate(stream.tables):
                own = gradients[spec.name][request.orders[hop.rank]].to(self._device)
                parts = [own if peer == hop.rank else arrived[peer][i][j] for peer in hop.peers]
                if len(parts) > 1:
                    # In a persistent buffer: getting fresh pages from the system takes longer than the additions.
                    shape = (len(request.distinct), spec.width)
                    own = self._workspace.get(f"sums/{level}/{spec.name}", shape, torch.float32, self._device)
                    _sum(parts, request.inverse, own)
                sums[spec.name] = own
        return sums

    def _fields(self, table: str) -> tuple[Field, ...]:
        return self._tables[table].rows.fields

    def _form(self, fields: Sequence[Sequence[Field]], checked: bool) -> Form:
        sections = zip(self._names, fields, strict=True)
        return Form(tuple(Section(f"stream {name}", tuple(of)) for name, of in sections), checked)

    def _by_table(self, stream: Stream, section: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
        """The row fields at the end of a message's section, by table and field name."""
        names = [(spec.name, f.name) for spec in stream.tables for f in self._fields(spec.name)]
        tables: dict[str, dict[str, Tensor]] = {}
        for (table, name), block in zip(names, section[len(section) - len(names) :], strict=True):
            tables.setdefault(table, {})[name] = block
        return tables


def _at(order: Order, places: np.ndarray | None) -> Order:
    """The ``places``-th entries of ``order``."""
    if places is None:
        return order
    return places + order.start if isinstance(order, slice) else order[places]


def _sum(parts: Sequence[Tensor], inverse: Sequence[np.ndarray], out: Tensor) -> None:
    """Write to ``out`` the sum of ``parts[i]`` at ``inverse[i]``, part after part."""
    for i, (part, index) in enumerate(zip(parts, inverse, strict=True)):
        segment_sum(part, torch.from_numpy(index).to(part.device), len(out), out=out, accumulate=i > 0)
