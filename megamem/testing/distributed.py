"""Run a function on several gloo ranks of this machine, as an ordinary test.

Ranks are forked from a server process that has already imported the heavy libraries, so that starting four of them takes
well under a second after the first use.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

_PRELOAD = ["torch", "torch.distributed", "megamem.testing.preload"]


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0, **kwargs: Any
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` on ``world_size`` ranks with a gloo process group; results in rank order.

    ``function`` must be importable (defined at the top of a module) and return something that can be pickled. The default
    process group is initialised before it is called, through a file, so no port is used. The first failure of any rank ends
    all of them and is raised here with its traceback; ranks that do not finish within ``timeout`` seconds are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        ranks = [
            context.Process(target=_rank, args=(queue, rank, world_size, folder, timeout, function, args, kwargs))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(queue, ranks, timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(queue: Any, ranks: list[Any], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(ranks):
        try:
            rank, result, failure = queue.get(timeout=0.2)
        except Empty:
            dead = [i for i, p in enumerate(ranks) if p.exitcode not in (None, 0) and i not in results]
            if dead:
                raise RuntimeError(f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                missing = [i for i in range(len(ranks)) if i not in results]
                raise TimeoutError(f"ranks {missing} did not finish within {timeout} s") from None
            continue
        if failure is not None:
            raise RuntimeError(f"rank {rank} failed:\n{failure}")
        results[rank] = pickle.loads(result)
    return [results[i] for i in range(len(ranks))]


def _rank(
    queue: Any, rank: int, world_size: int, folder: str, timeout: float, function: Any, args: Any, kwargs: Any
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        # By value: torch would hand tensors over as shared memory, which this process takes along when it ends.
        queue.put((rank, pickle.dumps(function(*args, **kwargs)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        queue.close()
        queue.join_thread()
        os._exit(1)
