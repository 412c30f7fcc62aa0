"""How much memory this process holds, on the host and on its device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes that this process holds."""

    host: int
    """Resident set size; pages of memory-mapped files count while they are resident."""
    device: int
    """Peak of the CUDA allocator since the last reading; 0 without CUDA."""

    @property
    def bytes(self) -> int:
        """The number of a step's ``memory_bytes``: the device's peak where there is a device, else the host's."""
        return self.device or self.host


def read_memory() -> MemoryReading:
    """Measure now, and start a new peak of the device."""
    import psutil
    import torch

    device = 0
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return MemoryReading(host=psutil.Process().memory_info().rss, device=device)
