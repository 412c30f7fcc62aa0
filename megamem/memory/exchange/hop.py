"""One level of an exchange: every rank of a group sends every other one a message."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamem.errors import ExchangeError
from megamem.memory.buffers import Buffers
from megamem.memory.exchange.message import Form, Section
from megamem.memory.exchange.nodes import Link, NodeLayout
from megamem.memory.stats import StepStats
from megamem.parallel.layout import owner_range
from megamem_kernels.formats import Field
from megamem_kernels.random import key_of

Counts = Sequence[Sequence[int]]
"""Rows by peer and section of a message."""
Call = Literal["request", "patch"]

CPU = torch.device("cpu")
HINT = "start all ranks with the same code and configuration, and check the network if they are"
_CALLS: tuple[Call, ...] = ("request", "patch")
_HEADER = Field("header", torch.int64, ())


class Workspace:
    """Buffers by device, in pinned memory on a host with CUDA. One thread at a time uses them."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Buffers] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Undefined content, valid until the next call with this name, dtype and device."""
        if device not in self._buffers:
            pinned = device.type == "cpu" and torch.cuda.is_available()
            self._buffers[device] = Buffers(device, pinned=pinned)
        return self._buffers[device].get(f"{name}/{dtype}", shape, dtype)

    def moved(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """``tensor`` itself where it is on ``device``, else a copy that is complete for the host when this returns."""
        if tensor.device == device:
            return tensor
        return self.get(name, tuple(tensor.shape), tensor.dtype, device).copy_(tensor)


@dataclass(frozen=True, slots=True)
class Hop:
    """An all-to-all between the ranks of one link, and which of them is asked for what.

    Positions are cut into blocks, one per owner that the hop leads to. A peer counts the rows of its blocks from 0, one block
    after the other: these are its coordinates, and the positions of the next hop.
    """

    link: Link
    members: tuple[int, ...]
    """Rank in the memory group of every rank of the link."""
    rank: int
    """This rank in the link."""
    owners: tuple[tuple[int, ...], ...]
    """Of every rank of the link: the ranks of the memory group whose blocks it is asked for, ascending."""
    workspace: Workspace
    store_device: torch.device
    """Where messages with rows are packed, and where gradients are wanted."""
    wire_device: torch.device
    """Where the row group of the link wants its messages."""
    checked: bool
    """Whether counts carry a checksum."""

    @property
    def peers(self) -> range:
        """Ranks of the link."""
        return range(len(self.members))

    def swap(
        self,
        what: str,
        step: int,
        form: Form,
        outgoing: Counts,
        incoming: Counts,
        fill: Callable[[int, list[list[Tensor]]], None],
        stats: StepStats,
        *,
        rows_to: torch.device | None = None,
        any_step: bool = False,
    ) -> dict[int, list[list[Tensor]]]:
        """Send every other peer a message, and receive theirs. Collective over the link.

        Args:
            what: What the messages hold, in the words of an error message.
            step: Of the data, likewise.
            form: Layout of the messages.
            outgoing: Rows of the message to each peer; what this rank would send itself is left out.
            incoming: Rows of the message from each peer.
            fill: Called with a peer and the blocks of the message to it, to write them.
            stats: Gets the bytes.
            rows_to: For rows and gradients: the device on which what arrives is wanted. Ids stay on the CPU.
            any_step: Take messages of other steps too, for the caller to look at.

        Returns:
            By peer, in rank order and without this rank, the blocks of its message: valid until the next call.

        Raises:
            ExchangeError: something arrives otherwise than it was sent, or the connection broke.
        """
        if len(self.members) == 1:
            return {}
        source, wire, group = CPU, CPU, self.link.group
        if rows_to is not None:
            source = self.store_device
            if self.link.row_group is not None:
                wire, group = self.wire_device, self.link.row_group
        send_sizes, receive_sizes = self._sizes(form, outgoing), self._sizes(form, incoming)
        send = self.workspace.get("send", (sum(send_sizes),), torch.uint8, source)
        received = self.workspace.get("received", (sum(receive_sizes),), torch.uint8, wire)
        for peer, message in enumerate(send.split(send_sizes)):
            if peer != self.rank:
                fill(peer, form.blocks(message, outgoing[peer]))
        packed = self.workspace.moved("send", send, wire)
        tag = key_of(what, None if any_step else step) >> 1
        for peer, message in enumerate(packed.split(send_sizes)):
            if peer != self.rank:
                form.seal(message, outgoing[peer], tag)
        try:
            dist.all_to_all_single(received, packed, receive_sizes, send_sizes, group=group)
            stats.bytes_sent += len(send)
            stats.bytes_received += len(received)
        except RuntimeError as error:
            raise ExchangeError(
                f"the exchange of {what} of step {step} broke off on rank {self.members[self.rank]} of the memory group: "
                f"{_sentence(error)}; another rank stopped or cannot be reached, its own message says why"
            ) from error
        for peer, message in enumerate(received.split(receive_sizes)):
            if peer != self.rank and (damaged := form.damaged(message, incoming[peer], tag)):
                raise ExchangeError(
                    f"the {what} that rank {self.members[peer]} of the memory group sent rank {self.members[self.rank]} in "
                    f"step {step} for {damaged} did not arrive as they were sent; check the network and the memory of both"
                )
        arrived = self.workspace.moved("received", received, rows_to or CPU).split(receive_sizes)
        return {peer: form.blocks(arrived[peer], incoming[peer]) for peer in self.peers if peer != self.rank}

    def swap_counts(
        self, call: Call, step: int, streams: Sequence[str], outgoing: Counts, limits: Counts, stats: StepStats
    ) -> list[list[int]]:
        """Tell every peer how many rows of each stream the next message to it holds; the same from every peer.

        What every rank is doing travels along, so that ranks that have drifted apart notice before rows are mixed up. What this
        rank would tell itself is in the result too.

        Raises:
            ExchangeError: a peer is elsewhere, or its counts lie outside ``[0, limit]``; see also :meth:`swap`.
        """
        ours = (_CALLS.index(call), step)
        form = Form((Section("all streams", (_HEADER,)),), self.checked)
        sizes = [[len(ours) + len(streams)]] * len(self.members)

        def fill(peer: int, blocks: list[list[Tensor]]) -> None:
            blocks[0][0].copy_(torch.tensor([*ours, *outgoing[peer]]))

        arrived = self.swap("row counts", step, form, sizes, sizes, fill, stats, any_step=True)
        incoming = [list(counts) for counts in outgoing]
        for peer, blocks in arrived.items():
            index, at, *counts = blocks[0][0].tolist()
            if (index, at) != ours:
                theirs = _CALLS[index] if 0 <= index < len(_CALLS) else "unknown call"
                raise ExchangeError(
                    f"rank {self.members[peer]} of the memory group is at the {theirs} of step {at} while rank "
                    f"{self.members[self.rank]} is at the {call} of step {step}; {HINT}"
                )
            for stream, count, limit in zip(streams, counts, limits[peer], strict=True):
                if not 0 <= count <= limit:
                    raise ExchangeError(
                        f"the {call} of rank {self.members[peer]} of the memory group to rank {self.members[self.rank]} in "
                        f"step {step} is for {count} rows of stream {stream}, of which there are {limit}; {HINT}"
                    )
            incoming[peer] = counts
        return incoming

    def limit(self, peer: int, rows: int, owners: int) -> int:
        """Rows that ``peer`` answers for, of a table of ``rows`` on ``owners``. Its coordinates have no gaps below: only the
        last owners have fewer rows than the others."""
        return sum(len(owner_range(rows, owners, owner)) for owner in self.owners[peer])

    def counts(self, ids: np.ndarray, share: int) -> list[int]:
        """How many of ascending positions ``ids`` (``[n]`` int64) lie in each block of ``share`` positions."""
        edges = np.arange(sum(map(len, self.owners)) + 1) * share
        return np.diff(np.searchsorted(ids, edges)).tolist()

    def cut(
        self, ids: np.ndarray, counts: Sequence[int], share: int
    ) -> tuple[list[slice | np.ndarray], list[np.ndarray]]:
        """By peer, where in ascending positions ``ids`` (``[n]`` int64) the rows that it is asked for lie, and which they are in
        its coordinates; ``counts`` of them lie in each block of ``share`` positions."""
        edges = np.cumsum([0, *counts])
        block_of = {owner: block for block, owner in enumerate(sorted(owner for mine in self.owners for owner in mine))}
        orders: list[slice | np.ndarray] = []
        coordinates = []
        for mine in self.owners:
            blocks = [block_of[owner] for owner in mine]
            ranges = [(int(edges[block]), int(edges[block + 1])) for block in blocks]
            pieces = [
                ids[start:stop] - (block - place) * share
                for place, (block, (start, stop)) in enumerate(zip(blocks, ranges, strict=True))
            ]
            if len(ranges) == 1:
                orders.append(slice(*ranges[0]))
                coordinates.append(pieces[0])
            else:
                orders.append(np.concatenate([np.arange(start, stop) for start, stop in ranges]))
                coordinates.append(np.concatenate(pieces))
        return orders, coordinates

    def _sizes(self, form: Form, counts: Counts) -> list[int]:
        return [0 if peer == self.rank else form.nbytes(counts[peer]) for peer in self.peers]


def _sentence(error: RuntimeError) -> str:
    """The first sentence of what a backend says, without the place in its source."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error)).partition("\n")[0].partition(". ")[0].rstrip(".")


def build_hops(
    rank: int,
    size: int,
    link: Link,
    nodes: NodeLayout | None,
    *,
    workspace: Workspace,
    store_device: torch.device,
    wire_device: torch.device,
    checked: bool,
) -> tuple[Hop, ...]:
    """The hops that lead ``rank`` of a memory group of ``size`` to the owners: one over ``link``, or two over ``nodes``;
    none in a group of nobody. For the other arguments see :class:`Hop`."""
    hop = partial(Hop, workspace=workspace, store_device=store_device, wire_device=wire_device, checked=checked)
    everyone = tuple(range(size))
    if not everyone:
        return ()
    if nodes is None:
        return (hop(link, everyone, rank, tuple((owner,) for owner in everyone)),)
    per_node = nodes.ranks_per_node
    node, local = divmod(rank, per_node)
    here, alike = everyone[node * per_node :][:per_node], everyone[local::per_node]
    return (
        hop(nodes.within, here, local, tuple(everyone[j::per_node] for j in range(per_node))),
        hop(nodes.between, alike, node, tuple((owner,) for owner in alike)),
    )
