"""The traffic of one optimizer step inside a memory group: ids to owners, rows back, gradients to owners.

Each is a single all-to-all over all streams and tables. Messages are flat: for every peer, for every stream in order,
and for rows for every table of the stream in order, the rows in ascending id. What arrives from another rank is validated
before it is used as an index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megamem.errors import ExchangeError
from megamem.memory.plan import FetchPlan
from megamem.memory.stats import StepStats
from megamem.memory.table import OwnedTable
from megamem.parallel.layout import owner_range

if TYPE_CHECKING:
    from megamem.memory.streams import Stream

_HINT = "start all ranks with the same code and configuration, and check the network if they are"


@dataclass(frozen=True, slots=True)
class Requests:
    """The rows that every rank of the group wants from this owner in one step."""

    ids: dict[str, tuple[Tensor, ...]]
    """Per stream and sender: ``[count]`` int64 rows counted from the owner's first, ascending."""


class Exchange:
    """The three exchanges of a step for a fixed list of streams. Holds nothing of any step.

    Args:
        streams: The same streams in the same order on every rank.
        group: A gloo group, whose rank ``i`` owns the ``i``-th range of rows; None for this process alone.
    """

    def __init__(self, streams: Sequence[Stream], group: dist.ProcessGroup | None) -> None:
        self.streams = tuple(streams)
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self._owned = {s.name: owner_range(s.rows, self.size, self.rank) for s in self.streams}

    def fetch(
        self, plan: FetchPlan, tables: Mapping[str, OwnedTable], stats: StepStats
    ) -> tuple[dict[str, Tensor], Requests]:
        """Ask the owners for the rows of ``plan``, and serve what others ask of this rank. Collective over the group.

        Returns:
            Per table the working set ``[unique, width]`` fp32 in the order of the plan's ids, and what this owner was
            asked for.

        Raises:
            ExchangeError: a rank is at another step, or asked for rows that this rank does not own.
        """
        if not self.streams:
            return {}, Requests({})
        requests = self._exchange_ids(plan, stats)
        asked, wanted = self._asked(requests), self._wanted(plan)
        pieces = iter(self._pieces(send := torch.empty(self._elements(asked)), asked))
        for sender in range(self.size):
            for stream in self.streams:
                ids = requests.ids[stream.name][sender]
                for spec in stream.tables:
                    torch.index_select(tables[spec.name].rows, 0, ids, out=next(pieces).view(len(ids), spec.width))
        working_sets = self._exchange_rows(send, asked, wanted, stats)
        stats.rows_received += sum(len(rows) for rows in working_sets.values())
        return working_sets, requests

    def return_gradients(
        self, plan: FetchPlan, requests: Requests, gradients: Mapping[str, Tensor], stats: StepStats
    ) -> dict[str, Tensor]:
        """Send working-set gradients to the owners of the rows. Collective over the group.

        Args:
            plan: The plan that :meth:`fetch` was called with.
            requests: What :meth:`fetch` returned.
            gradients: Per table ``[unique, width]`` fp32 on the CPU in the order of the plan's ids; a missing table
                counts as zero.

        Returns:
            Per table ``[n, width]``: the gradients of the rows of ``requests``, sender after sender.
        """
        if not self.streams:
            return {}
        asked, wanted = self._asked(requests), self._wanted(plan)
        pieces = iter(self._pieces(send := torch.zeros(self._elements(wanted)), wanted))
        bounds = {name: stream.bounds for name, stream in plan.streams.items()}
        for owner in range(self.size):
            for stream in self.streams:
                start, stop = bounds[stream.name][owner]
                for spec in stream.tables:
                    piece = next(pieces).view(stop - start, spec.width)
                    if spec.name in gradients:
                        piece.copy_(gradients[spec.name][start:stop])
        return self._exchange_rows(send, wanted, asked, stats)

    def _exchange_ids(self, plan: FetchPlan, stats: StepStats) -> Requests:
        # The step travels with the counts: ranks that have drifted apart notice before rows are mixed up.
        header = torch.tensor([[plan.step, *counts] for counts in self._wanted(plan)])
        sizes = [header.shape[1]] * self.size
        arrived = self._all_to_all(header.view(-1), sizes, sizes, stats).view(header.shape).tolist()
        for sender, (step, *counts) in enumerate(arrived):
            self._validate_counts(plan.step, sender, step, counts)
        counts_by_sender = [counts for _, *counts in arrived]

        ids = [
            torch.from_numpy(plan.streams[s.name].ids).split(list(plan.streams[s.name].counts)) for s in self.streams
        ]
        received = self._all_to_all(
            torch.cat([stream_ids[peer] for peer in range(self.size) for stream_ids in ids]),
            [sum(counts) for counts in self._wanted(plan)],
            [sum(counts) for counts in counts_by_sender],
            stats,
        )
        pieces = iter(received.split([count for counts in counts_by_sender for count in counts]))
        local: dict[str, list[Tensor]] = {stream.name: [] for stream in self.streams}
        for sender in range(self.size):
            for stream in self.streams:
                local[stream.name].append(self._validated_ids(stream.name, sender, next(pieces)))
        return Requests({name: tuple(tensors) for name, tensors in local.items()})

    def _validate_counts(self, own_step: int, sender: int, step: int, counts: list[int]) -> None:
        if step != own_step:
            raise ExchangeError(
                f"rank {sender} of the memory group is at step {step} while rank {self.rank} is at step {own_step}; "
                f"{_HINT}"
            )
        for stream, count in zip(self.streams, counts, strict=True):
            if not 0 <= count <= len(self._owned[stream.name]):
                raise ExchangeError(
                    f"rank {sender} of the memory group asks rank {self.rank} for {count} rows of stream "
                    f"{stream.name}, which has {len(self._owned[stream.name])} here; {_HINT}"
                )

    def _validated_ids(self, stream: str, sender: int, ids: Tensor) -> Tensor:
        """``ids`` counted from the first owned row; ExchangeError unless they are owned and ascending."""
        owned = self._owned[stream]
        wrong = (ids < owned.start) | (ids >= owned.stop)
        wrong[1:] |= ids[1:] <= ids[:-1]
        if wrong.any():
            raise ExchangeError(
                f"rank {sender} of the memory group asks rank {self.rank} for row {int(ids[wrong][0])} of stream "
                f"{stream}, which is repeated, out of order or outside the rows [{owned.start}, {owned.stop}) here; {_HINT}"
            )
        return ids - owned.start

    def _exchange_rows(
        self, send: Tensor, send_counts: list[list[int]], receive_counts: list[list[int]], stats: StepStats
    ) -> dict[str, Tensor]:
        """Exchange a row message; per table the rows that arrived, peer after peer."""
        received = self._all_to_all(
            send,
            [sum(peer) for peer in self._sizes(send_counts)],
            [sum(peer) for peer in self._sizes(receive_counts)],
            stats,
        )
        pieces = iter(self._pieces(received, receive_counts))
        tables = [spec for stream in self.streams for spec in stream.tables]
        by_table: dict[str, list[Tensor]] = {spec.name: [] for spec in tables}
        for _ in range(self.size):
            for spec in tables:
                by_table[spec.name].append(next(pieces).view(-1, spec.width))
        return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in by_table.items()}

    def _all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int], stats: StepStats) -> Tensor:
        """Send the ``i``-th piece of flat ``send`` to rank ``i``; the pieces that arrive, in rank order."""
        if self.size == 1:
            return send
        received = send.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=self.group)
        stats.bytes_sent += (send.numel() - send_sizes[self.rank]) * send.element_size()
        stats.bytes_received += (received.numel() - receive_sizes[self.rank]) * send.element_size()
        return received

    def _wanted(self, plan: FetchPlan) -> list[list[int]]:
        """Rows this rank wants, by owner and stream."""
        return [[plan.streams[s.name].counts[owner] for s in self.streams] for owner in range(self.size)]

    def _asked(self, requests: Requests) -> list[list[int]]:
        """Rows this rank is asked for, by sender and stream."""
        return [[len(requests.ids[s.name][sender]) for s in self.streams] for sender in range(self.size)]

    def _sizes(self, counts: list[list[int]]) -> list[list[int]]:
        """Elements of a row message by peer and piece, one piece per table of every stream."""
        return [
            [count * spec.width for stream, count in zip(self.streams, peer, strict=True) for spec in stream.tables]
            for peer in counts
        ]

    def _elements(self, counts: list[list[int]]) -> int:
        return sum(map(sum, self._sizes(counts)))

    def _pieces(self, message: Tensor, counts: list[list[int]]) -> Sequence[Tensor]:
        return message.split([size for peer in self._sizes(counts) for size in peer])
