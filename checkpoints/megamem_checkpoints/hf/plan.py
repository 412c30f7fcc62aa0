"""What an export writes, decided before anything is written: every tensor with its source, every source with its fate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the exported model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    """Canonical tensors and tables of the checkpoint that it is made of; none for a constant."""
    pieces: Callable[[], Iterator[Tensor]]
    """Its content, of ``dtype``, cut along the first dimension, in order: one piece is in memory at a time."""
    file: int | None = None
    """Tensors of the same number have a weight file of their own, whatever its size; None: wherever there is room."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A model directory of one architecture."""

    model_type: str
    config: Any
    """A ``PretrainedConfig``."""
    tensors: list[PlannedTensor]
    expected: Mapping[str, tuple[int, ...]]
    """Names and shapes of all tensors that the architecture saves."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Canonical tensors and tables that have no place in the exported model, with the reason."""
    code: tuple[Path, ...] = ()
    """Modelling code that the directory carries; none for an architecture that transformers knows."""
    notes: tuple[str, ...] = ()
    """Sentences for the model card: what its users should know about this form of the model."""
    packs: bool = True
    """Whether the architecture tells packed documents apart by ``position_ids`` that start again."""
