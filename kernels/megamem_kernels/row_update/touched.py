"""What an update changes: touched rows and their optimizer state, and the check that all of it fits together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megamem_kernels.formats import ROWS, format_of, require, row_fields


@dataclass(frozen=True, slots=True)
class TouchedRows:
    """The rows of one update in the store that holds them."""

    fields: Mapping[str, Tensor]
    """Fields of :mod:`megamem_kernels.formats`, ``[slots, ...]``; changed at ``slots``."""
    slots: Tensor
    """``[u]`` int64, distinct."""
    ids: Tensor
    """``[u]`` int64 logical row ids: with ``key`` and the step, they key stochastic rounding."""
    key: int
    """In ``[0, 2**64)``, another one for each table."""


@dataclass(frozen=True, slots=True)
class TouchedState:
    """Their optimizer state in the store that holds it."""

    arrays: Mapping[str, Tensor]
    """``[slots, width]`` or ``[slots]``; changed at ``slots``. All zeros is the state before the first update."""
    slots: Tensor
    """``[u]`` int64, distinct, in the order of the rows."""


def check(
    gradient: Tensor,
    rows: TouchedRows | None = None,
    state: TouchedState | None = None,
    **expected: tuple[torch.dtype, bool],
) -> None:
    """ValueError where a tensor of an update is not what the others ask for.

    Args:
        gradient: ``[u, width]`` fp32; its device is where the update runs.
        rows: What it changes.
        state: Their state.
        expected: By name of a state array, its dtype, and whether it has a value per element or per row.
    """
    count, width = gradient.shape
    device = gradient.device
    require("gradient", gradient, torch.float32, (count, width), device)
    if rows is not None:
        for field in row_fields(format_of(rows.fields), width):
            _require(field.name, rows.fields[field.name], field.dtype, (len(rows.fields[ROWS]), *field.shape), device)
        _require("slots of rows", rows.slots, torch.int64, (count,), device)
        _require("ids", rows.ids, torch.int64, (count,), device)
    if state is not None:
        _require("slots of state", state.slots, torch.int64, (count,), device)
        for name, (dtype, per_element) in expected.items():
            array = state.arrays[name]
            _require(name, array, dtype, (len(array), width) if per_element else (len(array),), device)


def _require(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    reachable = device.type != "cpu" and tensor.device.type == "cpu" and tensor.is_pinned()
    require(name, tensor, dtype, shape, tensor.device if reachable else device)
