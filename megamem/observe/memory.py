"""How much memory this process holds."""

from __future__ import annotations

from pathlib import Path


def memory_bytes() -> int:
    """Peak of the CUDA allocator where this process uses one, else the resident set size, in bytes.

    Resident pages of memory-mapped files count in the latter.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return rss()


def rss() -> int:
    """Bytes that are resident now, pages of the libraries' files included."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Most bytes that were resident since the process began, or since :func:`reset_peak_rss`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def reset_peak_rss() -> bool:
    """Begin the peak of the resident set anew; whether the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
