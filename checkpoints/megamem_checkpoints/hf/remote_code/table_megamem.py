"""Memory tables in transformers: ranges of rows in fp32, bf16 or fp8, on the device of the model, in host memory or on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_megamem import MegamemConfig

_BLOCK = 32
_HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


class MegamemTableShard(nn.Module):
    """Rows of a table as they are stored: `weight` `[rows, width]` and, in fp8, `scale` `[rows, width / 32]` uint8.

    A value in fp8 is the E4M3 number times `2 ** (scale - 127)` (ue8m0) of its block of 32. `placement` as in
    [`MegamemConfig`]: outside of the device of the model, `fields` holds what [`attach`] brought, and neither `.to()` nor a
    device map knows of it.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, placement: str):
        super().__init__()
        self.rows, self.width, self.placement = rows, width, placement
        self.shapes: dict[str, tuple[int, int]] = {"weight": (rows, width)}
        self.fields: dict[str, torch.Tensor] = {}
        trainable = dtype != torch.float8_e4m3fn
        if not trainable:
            self.shapes["scale"] = (rows, -(-width // _BLOCK))
        if placement != "device":
            return
        weight = torch.empty(rows, width, dtype=dtype)
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("scale", torch.empty(self.shapes["scale"], dtype=torch.uint8))

    def attach(self, key: str, tensor: torch.Tensor) -> None:
        """Take the field that is called `key` in a state dict: a tensor on the CPU, which may be mapped from a file."""
        name = key.rpartition(".")[2]
        if tuple(tensor.shape) != self.shapes[name]:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, and {self.shapes[name]} by the configuration")
        self.fields[name] = tensor

    def forward(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Values `[n, width]` on `device` of `rows` `[n]`; they travel as they are stored."""
        weight, scale = (self.fields.get(name, getattr(self, name, None)) for name in ("weight", "scale"))
        if weight is None:
            raise RuntimeError(
                f"this model has no memory tables: table_placement={self.placement!r} is for from_pretrained; build it with "
                "table_placement='device'"
            )
        rows = rows.to(weight.device)
        if scale is None:
            return F.embedding(rows, weight).to(device)
        values = weight.view(torch.uint8)[rows].to(device).view(torch.float8_e4m3fn).float()
        factors = (scale[rows].to(device, torch.int32) << 23).view(torch.float32)
        return values * factors.repeat_interleave(_BLOCK, dim=-1)[:, : self.width]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.fields.items()})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for key in [prefix + name for name in self.fields]:
            if key in state_dict:
                self.attach(key, state_dict[key].cpu())
                if key in unexpected:
                    unexpected.remove(key)
            elif strict:
                missing.append(key)


class MegamemTable(nn.Module):
    """A table `[rows, width]`: module `shard_i` of `n` has rows `i * rows // n` up to `(i + 1) * rows // n`."""

    def __init__(self, config: MegamemConfig, rows: int, width: int, dtype: str):
        super().__init__()
        self.rows = rows
        self.count = min(config.table_shards, rows)
        self.starts = [i * rows // self.count for i in range(self.count)]
        for i, (start, stop) in enumerate(zip(self.starts, [*self.starts[1:], rows], strict=True)):
            shard = MegamemTableShard(stop - start, width, getattr(torch, dtype), config.table_placement)
            self.add_module(f"shard_{i}", shard)

    def forward(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Values `[..., width]` of `rows` `[...]` int64, in the dtype and on the device of `like`."""
        flat = rows.flatten()
        if self.count == 1:
            values = self.shard_0(flat, like.device)
        else:
            shard = ((flat + 1) * self.count - 1) // self.rows  # the last one that starts at the row or before
            order = shard.argsort(stable=True)
            parts = flat[order].split(shard.bincount(minlength=self.count).tolist())
            values = torch.cat(
                [
                    self.get_submodule(f"shard_{i}")(part - start, like.device)
                    for i, (part, start) in enumerate(zip(parts, self.starts, strict=True))
                    if len(part)
                ]
            )
            values = values[order.argsort().to(like.device)]
        return values.to(like.dtype).view(*rows.shape, -1)


def attach_tables(model: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Give the tables that are not on the device of `model` their fields: `read(name)` returns one on the CPU."""
    for prefix, module in model.named_modules():
        if isinstance(module, MegamemTableShard) and module.placement != "device":
            for name in module.shapes:
                tensor = read(key := f"{prefix}.{name}")
                module.attach(key, tensor.clone() if module.placement == "cpu" else tensor)


def checkpoint_reader(path: str, options: Mapping[str, Any]) -> Callable[[str], torch.Tensor]:
    """Reads tensors by name from the weight files at `path`, a folder or a repository: memory that maps the file.

    `options` are those of `from_pretrained`; the ones on where files come from are used.
    """
    where = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **where)
    files: dict[str, str] | None = None
    if index is not None:
        with open(index, encoding="utf-8") as file:
            files = json.load(file)["weight_map"]

    def read(name: str) -> torch.Tensor:
        file = SAFE_WEIGHTS_NAME if files is None else files.get(name)
        if file is not None:
            with safe_open(cached_file(path, file, **where), framework="pt") as opened:
                if name in set(opened.keys()):
                    return opened.get_tensor(name)
        raise ValueError(f"{path} has no {name}, which the model needs by its configuration")

    return read
