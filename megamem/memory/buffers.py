"""Buffers that persist from step to step: they grow to the largest step and are handed out again."""

from __future__ import annotations

import torch
from torch import Tensor

_HEADROOM = 1.125
"""Steps differ a little in size: growing by an eighth more than asked for ends most reallocation after the first steps."""


class Buffers:
    """Named buffers on one device. What :meth:`get` returns is valid until the next call with the same name."""

    def __init__(self, device: torch.device | str = "cpu", *, pinned: bool = False) -> None:
        self._device = torch.device(device)
        self._pinned = pinned
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with undefined content."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            self._buffers.pop(name, None)
            buffer = torch.empty(int(size * _HEADROOM), dtype=dtype, device=self._device, pin_memory=self._pinned)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
