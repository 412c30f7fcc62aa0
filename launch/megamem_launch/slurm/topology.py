"""How the groups of a layout fall on nodes, which the ranks fill one after another."""

from __future__ import annotations

from megamem.errors import ConfigError
from megamem.parallel.layout import Layout
from megamem_launch.cluster import Cluster
from megamem_launch.config import RunConfig


def check_topology(config: RunConfig, layout: Layout, cluster: Cluster) -> list[str]:
    """What a person should know of groups that cross nodes: one line each, most costly first.

    Ranks are ordered tensor-parallel fastest, then context, data and pipeline, and node ``i`` holds the ``ranks_per_node``
    ranks from ``i * ranks_per_node`` on. Tensor-parallel groups exchange activations several times per layer, so they must lie
    within a node. A memory group, the ranks of a pipeline stage, lies within a node or takes whole ones: then rows cross once
    per node, else once per rank.

    Raises:
        ConfigError: a tensor-parallel group crosses nodes, or ``memory.hierarchical`` is on and cannot be.
    """
    per_node = cluster.ranks_per_node
    if cluster.nodes == 1:
        return []
    if layout.tp > per_node:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={layout.tp} is more than the {per_node} ranks of a node, and a tensor-parallel "
            f"group must lie within one; set it to at most {per_node}, or use parallel.pipeline_model_parallel_size for the rest"
        )
    if per_node % layout.tp:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={layout.tp} does not divide the {per_node} ranks of a node, so a "
            f"tensor-parallel group would cross nodes; set it to a divisor of {per_node}, or change ranks_per_node"
        )
    notes = []
    if per_node % layout.slices and layout.cp > 1:
        notes.append(
            f"context-parallel groups of {layout.slices} ranks (parallel.context_parallel_size={layout.cp} x tensor "
            f"{layout.tp}) cross nodes of {per_node}: keys and values of every layer go over the network"
        )
    experts = layout.ep * layout.etp
    if layout.ep > 1 and per_node % experts:
        notes.append(
            f"expert-parallel groups of {experts} ranks cross nodes of {per_node}: tokens of every MoE layer go over the network"
        )
    return notes + _memory_notes(config, layout, per_node)


def _memory_notes(config: RunConfig, layout: Layout, per_node: int) -> list[str]:
    memory, size = config.memory, layout.stage_size
    if not (memory.engram.layers or memory.bank.enabled):
        return []
    whole = size % per_node == 0
    if memory.hierarchical == "on" and not (whole and size > per_node > 1):
        raise ConfigError(
            f"memory.hierarchical is on, but the {size} ranks of a pipeline stage are not several whole nodes of {per_node}; "
            "set memory.hierarchical=auto, or a layout whose stages take whole nodes"
        )
    if whole or per_node % size == 0:
        return []
    return [
        f"memory groups of {size} ranks (a pipeline stage) are not whole nodes of {per_node}: rows cross the network once per "
        "rank in place of once per node; a pipeline whose stages take whole nodes avoids it"
    ]
