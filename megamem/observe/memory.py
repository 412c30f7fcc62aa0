"""How much memory this process holds."""

from __future__ import annotations


def memory_bytes() -> int:
    """Peak of the CUDA allocator where this process uses one, else the resident set size, in bytes.

    Resident pages of memory-mapped files count in the latter.
    """
    import psutil
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
