"""Random states of a rank. They matter to a resume under the same world size only; any other starts them afresh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megamem_checkpoints.manifest import FileRecord
from megamem_checkpoints.stream import write_tensors

_CPU = "torch.cpu"
_CUDA = "torch.cuda"


def file_name(rank: int) -> str:
    """Path of a rank's states, relative to the checkpoint."""
    return f"rng/rank_{rank:05d}.safetensors"


def collect(extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of torch's own states of this process (uint8) and of ``extra`` ones of the caller."""
    states = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[_CUDA] = torch.cuda.get_rng_state()
    return states | {name: state.detach().to("cpu", copy=True) for name, state in extra.items()}


def write(path: Path, states: Mapping[str, Tensor]) -> FileRecord:
    """Save what :func:`collect` returned."""
    return write_tensors(path, states)


def restore(path: Path) -> dict[str, Tensor]:
    """Set torch's own states from a file; returns the caller's."""
    states = load_file(path)
    torch.set_rng_state(states.pop(_CPU))
    cuda = states.pop(_CUDA, None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    return states
