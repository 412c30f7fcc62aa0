"""The weight files of an export, written tensor by tensor and piece by piece."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from megamem.errors import ExportError
from megamem_checkpoints.hf.plan import PlannedTensor
from megamem_checkpoints.manifest import FileRecord
from megamem_checkpoints.stream import write_safetensors

INDEX = "model.safetensors.index.json"


def write_weights(folder: Path, tensors: Sequence[PlannedTensor], max_shard_size: int | str) -> dict[str, FileRecord]:
    """Write ``tensors`` as ``model.safetensors``, or as several files with an index; returns size and checksum by name.

    No file is larger than ``max_shard_size`` but one of a single tensor, or of tensors that ask for a file of their own.
    At any moment, one piece of one tensor is in memory.

    Raises:
        ExportError: ``max_shard_size`` is no size.
        OSError: a file cannot be written.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    groups = _groups(tensors, max_shard_size)
    records: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shapes = {name: (by_name[name].dtype, by_name[name].shape) for name in names}
        records[file] = write_safetensors(
            folder / file, shapes, lambda name: by_name[name].pieces(), metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(map(tensor_bytes, tensors))}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return records


def tensor_bytes(tensor: PlannedTensor) -> int:
    """Size of a tensor in its file."""
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _groups(tensors: Sequence[PlannedTensor], max_shard_size: int | str) -> list[list[str]]:
    """Names of the tensors of each file: those with room to share first, then those with a file of their own."""
    shared = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors if t.file is None}
    try:
        split = split_torch_state_dict_into_shards(shared, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ExportError(f"max_shard_size is {max_shard_size!r}; set bytes, or a size such as 5GB") from error
    own: dict[int, list[str]] = defaultdict(list)
    for tensor in tensors:
        if tensor.file is not None:
            own[tensor.file].append(tensor.name)
    return [*split.filename_to_tensors.values(), *(own[number] for number in sorted(own))]
