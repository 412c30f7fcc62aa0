"""Order between the training loop's CUDA stream and that of the memory engine; nothing to do without a CUDA device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Fence:
    """A point in one stream that another one waits for: the only way the two streams are ordered."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def set(self) -> None:
        """Mark what the current stream was given so far."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Let the current stream wait for the mark; the host does not."""
        if self._event is not None:
            self._event.wait()

    def synchronize(self) -> None:
        """Let the host wait for the mark."""
        if self._event is not None:
            self._event.synchronize()


class SideStream:
    """The stream of the engine's own copies and kernels."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Make it the current stream of this thread."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            yield

    def synchronize(self) -> None:
        """Let the host wait until everything given to it is done."""
        if self._stream is not None:
            self._stream.synchronize()
