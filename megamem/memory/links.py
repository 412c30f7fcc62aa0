"""The process groups of a memory group: what carries its ids, and what carries its rows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.memory.exchange import NodeLayout
from megamem.memory.exchange.nodes import create_node_layout, equal_nodes, hosts_of_world
from megamem.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class MemoryLinks:
    """How the ranks of one memory group reach each other."""

    group: dist.ProcessGroup | None = None
    """gloo, over which every table of the stage is sharded; None for a process alone."""
    row_group: dist.ProcessGroup | None = None
    """NCCL group of the same ranks that carries rows and gradients; None where gloo does."""
    wire_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where messages with rows lie when they are sent."""
    nodes: NodeLayout | None = None
    """Groups within and between nodes, where rows are exchanged in two hops."""

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """All process groups that carry ids or rows."""
        hops = [self.nodes.within, self.nodes.between] if self.nodes is not None else []
        each = [self.group, self.row_group, *(group for hop in hops for group in (hop.group, hop.row_group))]
        return [group for group in each if group is not None]


def create_links(layout: Layout, memory: MemoryConfig, device: torch.device) -> MemoryLinks:
    """The links of this rank's memory group. Collective over the world, whose default group must exist.

    Raises:
        ConfigError: ``memory.transport`` is nccl without a CUDA device, or ``memory.hierarchical`` is on where the memory
            groups are not made of whole nodes of equally many ranks.
    """
    backend = _row_backend(memory, device)
    if layout.world_size == 1:
        return MemoryLinks()
    timeout = timedelta(seconds=memory.timeout_seconds)
    stages = [layout.memory_group(stage) for stage in range(layout.pp)]
    link: dict[str, dist.ProcessGroup] = {}
    for ranks in stages:
        # Every rank creates every group, in the same order.
        group = dist.new_group(ranks, timeout=timeout, backend="gloo")
        rows = dist.new_group(ranks, timeout=timeout, backend=backend) if backend else None
        if dist.get_rank() in ranks:
            link["group"] = group
            if rows is not None:
                link["row_group"] = rows
    per_node = _ranks_per_node(memory, stages)
    nodes = create_node_layout(stages, per_node, row_backend=backend, timeout=timeout) if per_node else None
    return MemoryLinks(**link, wire_device=device if backend else torch.device("cpu"), nodes=nodes)


def _row_backend(memory: MemoryConfig, device: torch.device) -> str | None:
    if memory.transport == "nccl" and device.type != "cuda":
        raise ConfigError("memory.transport is nccl, which carries CUDA tensors alone; set gloo or auto on the CPU")
    # Prefetching exchanges rows while the training loop's collectives run, in an order that differs from rank to rank: NCCL
    # may then wait for ever.
    return "nccl" if memory.transport != "gloo" and device.type == "cuda" and not memory.prefetch_depth else None


def _ranks_per_node(memory: MemoryConfig, stages: list[list[int]]) -> int | None:
    """Ranks of a memory group on each of its nodes, or None for a single hop; the same on every rank."""
    if memory.hierarchical == "off":
        return None
    if memory.hierarchical == "auto":
        hosts = hosts_of_world()
        sizes = {equal_nodes([hosts[rank] for rank in ranks]) for ranks in stages}
        return sizes.pop() if len(sizes) == 1 else None
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = len(stages[0])
    if size % per_node or per_node in (1, size):
        raise ConfigError(
            f"memory.hierarchical is on, but the {size} ranks of a pipeline stage are not several whole nodes of {per_node} "
            "ranks; set auto or off"
        )
    return per_node
