"""Threads of the CPU kernels: one pool per process, over which kernels that release the GIL share ranges of rows.

Kernels never see how the work was cut, so the number of threads changes no result. Compiled parallel loops are not used:
their thread layers either abort when two Python threads enter them (the prefetcher and the training loop do) or spin.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache

_threads = 0


def threads() -> int:
    """Threads that one kernel call may use: what :func:`set_threads` set, else the cores this process may run on."""
    return _threads or len(os.sched_getaffinity(0))


def set_threads(count: int) -> None:
    """Threads that one kernel call may use from now on; 0 for all cores this process may run on.

    Raises:
        ValueError: ``count`` is negative.
    """
    global _threads
    if count < 0:
        raise ValueError(f"{count} threads")
    _threads = count


def for_ranges(function: Callable[[int, int], None], count: int, *, grain: int) -> None:
    """Call ``function(low, high)`` on disjoint ranges that cover ``[0, count)``, in parallel; returns when all are done.

    Several Python threads may call this at a time. Where ranges raise, the others still run to their end, and then the
    error of the first of them is raised: no thread works on the arrays of a call that has returned.

    Args:
        function: Must release the GIL to profit, and must not call this function itself.
        count: Number of items; 0 calls nothing.
        grain: Fewest items worth a thread of their own: waking one costs 0.05 to 0.1 ms, so take some 0.3 ms of work.
    """
    workers = threads()
    parts = min(workers, count // max(1, grain))
    if parts <= 1:
        if count:
            function(0, count)
        return
    pool = _pool(workers - 1)
    edges = [count * part // parts for part in range(parts + 1)]
    others = [pool.submit(function, edges[i], edges[i + 1]) for i in range(1, parts)]
    try:
        function(0, edges[1])
    finally:
        wait(others)
    for future in others:
        future.result()


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    """Workers beside the calling thread. A pool that another replaces ends its threads when its last caller returns."""
    return ThreadPoolExecutor(max_workers=workers, thread_name_prefix="megamem-kernel")


# A forked process inherits the pool without its threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)
