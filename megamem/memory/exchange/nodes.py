"""Which process groups carry an exchange: one, or two where the ranks of a memory group are spread over nodes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist

from megamem_kernels.random import key_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Link:
    """How the same ranks reach each other."""

    group: dist.ProcessGroup | None
    """gloo: counts and ids. None for a process alone."""
    row_group: dist.ProcessGroup | None = None
    """Carries rows and gradients in place of :attr:`group`, such as one of NCCL."""


@dataclass(frozen=True, slots=True)
class NodeLayout:
    """A memory group of equal nodes: its rank is ``node * ranks_per_node + local rank``."""

    ranks_per_node: int
    within: Link
    """The ranks of this rank's node, by local rank."""
    between: Link
    """The ranks that have this rank's local rank, by node."""


def hosts_of_world() -> list[int]:
    """Of every rank of the world, a number that stands for its machine. Collective over the world, which carries CPU
    tensors."""
    ours = torch.tensor([key_of("host", socket.gethostname()) >> 1])
    hosts = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(hosts, ours)
    return [int(host) for host in hosts]


def equal_nodes(hosts: Sequence[int]) -> int | None:
    """Ranks per node, if two hops make sense for a memory group whose ranks live on ``hosts``, in rank order; None where it
    lies on one node, has one rank on each, or its nodes are unequal or interleaved (which is logged)."""
    sizes = [len(list(ranks)) for _, ranks in groupby(hosts)]
    if len(sizes) == 1 or max(sizes) == 1:
        return None
    if len(set(sizes)) > 1 or len(set(hosts)) != len(sizes):
        _log.warning(
            "nodes hold runs of %s neighbouring ranks of a memory group of %d; rows are exchanged between all of its ranks "
            "at once, because within and between nodes needs whole nodes of equally many",
            sorted(set(sizes)),
            len(hosts),
        )
        return None
    return sizes[0]


def create_node_layout(
    memory_groups: Sequence[Sequence[int]], ranks_per_node: int, *, row_backend: str | None, timeout: timedelta
) -> NodeLayout:
    """The groups of this rank, where every memory group has nodes of ``ranks_per_node`` ranks. Collective over the world.

    Args:
        memory_groups: World ranks of every memory group, node after node; each rank of the world is in one of them.
        ranks_per_node: Divides the size of every memory group.
        row_backend: What carries rows and gradients; None for the gloo groups.
        timeout: How long an exchange waits for the other ranks.
    """
    rank, ours = dist.get_rank(), {}

    def create(kind: str, ranks: list[int]) -> None:
        # Every rank creates every group, in the same order.
        group = dist.new_group(ranks, timeout=timeout, backend="gloo")
        rows = dist.new_group(ranks, timeout=timeout, backend=row_backend) if row_backend is not None else None
        if rank in ranks:
            ours[kind] = Link(group, rows)

    for members in memory_groups:
        nodes = [list(members[i : i + ranks_per_node]) for i in range(0, len(members), ranks_per_node)]
        for node in nodes:
            create("within", node)
        for peers in zip(*nodes, strict=True):
            create("between", list(peers))
    return NodeLayout(ranks_per_node, ours["within"], ours["between"])
