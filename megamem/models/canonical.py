"""Canonical names: every tensor of the model under one name and one global shape, whatever the layout.

megatron-core numbers layers within a chunk of a pipeline stage and experts within an expert-parallel rank, splits matrices over
tensor parallelism and stacks the two input projections of SwiGLU. Canonical names count layers and experts globally and
keep ``linear_fc1.gate`` (the half that goes through SiLU) and ``linear_fc1.up`` apart, so a tensor-parallel shard is
always one contiguous piece of one tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megamem.models.chunks import model_chunks
from megamem.parallel.groups import Groups

_TP_DIM = {"word_embeddings": 0, "output_layer": 0, "linear_qkv": 0, "linear_proj": 1, "linear_fc1": 0, "linear_fc2": 1}
_REPLICATED = re.compile(r"(_layernorm|\.router)\.(weight|expert_bias)$|\.(engram|bank)\.")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalEntry:
    """One canonical tensor as this rank holds it."""

    name: str
    tensor: Tensor
    """The parameter or buffer that holds it, alone or among others."""
    rows: slice
    """Where it lies along the first dimension of ``tensor``."""
    tp_dim: int | None
    """Dimension that tensor parallelism (of experts their own) splits; None where every rank of the group holds all of it."""
    is_copy: bool = False
    """A second copy of a tensor that another pipeline stage holds (the tied embedding on the last stage): write it when
    loading, leave it out when saving or counting."""

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to a routed expert, which expert and expert tensor parallelism distribute."""
        return ".mlp.experts." in self.name

    @property
    def local(self) -> Tensor:
        """This rank's shard: a view into ``tensor``, without gradient."""
        return self.tensor.detach()[self.rows]


def canonical_entries(model: nn.Module, groups: Groups) -> list[CanonicalEntry]:
    """Every parameter and persistent buffer of this rank's pipeline stage, in the order of the modules. ``model`` is what
    :func:`~megamem.models.chunks.model_chunks` takes.

    The order, and so the order of collectives over it, is the same on all ranks of a stage. ValueError for a tensor
    that has no canonical name, and for two tensors with one name.
    """
    entries: list[CanonicalEntry] = []
    for chunk in model_chunks(model):
        for local_name, tensor in [*chunk.named_parameters(), *_persistent_buffers(chunk)]:
            entries += _entries(chunk, groups, local_name, tensor)
    names = [entry.name for entry in entries]
    repeated = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if repeated:
        raise ValueError(f"two tensors of the model share the canonical name {min(repeated)}")
    return entries


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (f"{prefix}.{name}", buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]


def _entries(model: GPTModel, groups: Groups, local_name: str, tensor: Tensor) -> list[CanonicalEntry]:
    name = _global_numbers(model, groups, local_name)
    module = name.split(".")[-2]
    if module in _TP_DIM:
        tp_dim: int | None = _TP_DIM[module]
    elif _REPLICATED.search(name):
        tp_dim = None
    else:
        raise ValueError(f"parameter {local_name} has no canonical name; add it to megamem/models/canonical.py")
    if module == "output_layer" and model.share_embeddings_and_output_weights:
        return [CanonicalEntry(_EMBEDDING, tensor, slice(0, tensor.shape[0]), tp_dim, is_copy=True)]
    if module == "linear_fc1":
        half = tensor.shape[0] // 2
        stem = name.removesuffix("weight")
        return [
            CanonicalEntry(f"{stem}gate.weight", tensor, slice(0, half), tp_dim),
            CanonicalEntry(f"{stem}up.weight", tensor, slice(half, 2 * half), tp_dim),
        ]
    return [CanonicalEntry(name, tensor, slice(0, tensor.shape[0]), tp_dim)]


def _global_numbers(model: GPTModel, groups: Groups, name: str) -> str:
    if match := re.match(r"decoder\.layers\.(\d+)\.", name):
        layer = model.decoder.layers[int(match[1])].layer_number - 1  # megatron counts layers from 1, over all chunks
        name = f"decoder.layers.{layer}.{name[match.end() :]}"
    if match := re.search(r"\.experts\.local_experts\.(\d+)\.", name):
        expert = groups.coordinates.ep * (model.config.num_moe_experts // groups.layout.ep) + int(match[1])
        name = f"{name[: match.start()]}.experts.{expert}.{name[match.end() :]}"
    return name


def global_shape(entry: CanonicalEntry, groups: Groups) -> tuple[int, ...]:
    """Shape of the whole tensor, over all tensor-parallel ranks."""
    shape = list(entry.local.shape)
    if entry.tp_dim is not None:
        shape[entry.tp_dim] *= _shards(entry, groups)
    return tuple(shape)


def shard(entry: CanonicalEntry, full: Tensor, groups: Groups) -> Tensor:
    """This rank's part of ``full``, a tensor of the entry's global shape: a view."""
    if entry.tp_dim is None:
        return full
    mine = groups.coordinates.etp if entry.is_expert else groups.coordinates.tp
    return full.chunk(_shards(entry, groups), dim=entry.tp_dim)[mine]


def gather(entry: CanonicalEntry, local: Tensor, groups: Groups) -> Tensor:
    """The whole tensor from the shards of all tensor-parallel ranks. Collective over the tensor-parallel group.

    ``local`` has the entry's local shape: its weights, gradients or moments.
    """
    count = _shards(entry, groups)
    if entry.tp_dim is None or count == 1:
        return local
    shards = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(count)]
    dist.all_gather(shards, local.contiguous(), group=groups.etp if entry.is_expert else groups.tp)
    return torch.cat(shards, dim=entry.tp_dim)


def _shards(entry: CanonicalEntry, groups: Groups) -> int:
    return groups.layout.etp if entry.is_expert else groups.layout.tp
