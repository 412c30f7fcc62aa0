"""``python -m megamem_launch.supervise.preflight ARGUMENTS``: what a node is fit for, before ranks start on it.

srun runs it once on every node. It prints two lines of JSON: what the node is by itself, and, with several nodes, how they reach
each other. Standard output needs no shared directory, whose absence is one of the things that are looked for.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megamem.observe.heartbeat import node_name

MARK = "megamem-preflight "
"""Begins every line that is meant for the supervisor."""
_DISK_BYTES = 2**30
_SHM_BYTES = 64 * 2**20  # what NCCL and shared tables need at least
_REDUCED = {"gloo": 2**20, "nccl": 2**26}  # elements of the all-reduce that is timed
_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What the supervisor tells the nodes."""

    run_dir: str
    token_file: str
    """Written by the supervisor: a node that reads another token, or none, has another directory of the same name."""
    token: str
    gpus: int
    """Devices that must be there."""
    nodes: int
    endpoint: str
    """Where the nodes meet."""


def main(argv: list[str]) -> int:
    """Print the findings; 0 unless the all-reduce failed."""
    arguments = Arguments(**json.loads(argv[0]))
    found = examine(arguments)
    _say({"node": node_name(), **found})
    if arguments.nodes == 1:
        return 0
    try:
        _say(
            {
                "node": node_name(),
                "network": reach_others(arguments, use_gpu=arguments.gpus > 0 and not found["errors"]),
            }
        )
    except Exception as error:
        _say({"node": node_name(), "unreachable": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
        return 1
    return 0


def as_argument(arguments: Arguments) -> str:
    """``arguments`` as :func:`main` reads them."""
    return json.dumps(asdict(arguments))


def examine(arguments: Arguments) -> dict[str, Any]:
    """``shared``: whether the run directory is the supervisor's; ``errors`` and ``warnings`` in words; what was measured."""
    errors: list[str] = []
    warnings: list[str] = []
    try:
        shared = Path(arguments.token_file).read_text(encoding="utf-8") == arguments.token
    except OSError:
        shared = False
    measured: dict[str, Any] = {}
    if shared:
        measured["disk_free_gib"] = round(shutil.disk_usage(arguments.run_dir).free / 2**30, 2)
        if measured["disk_free_gib"] * 2**30 < _DISK_BYTES:
            errors.append(f"{measured['disk_free_gib']} GiB are free where {arguments.run_dir} lies")
        if not os.access(arguments.run_dir, os.W_OK):
            errors.append(f"{arguments.run_dir} cannot be written")
    if os.path.isdir("/dev/shm"):
        measured["shm_free_gib"] = round(shutil.disk_usage("/dev/shm").free / 2**30, 3)
        if measured["shm_free_gib"] * 2**30 < _SHM_BYTES:
            (errors if arguments.gpus else warnings).append(f"{measured['shm_free_gib']} GiB are free in /dev/shm")
    if arguments.gpus:
        errors += _examine_gpus(arguments.gpus)
    return {"shared": shared, "errors": errors, "warnings": warnings, **measured}


def reach_others(arguments: Arguments, *, use_gpu: bool) -> dict[str, Any]:
    """Sum over all nodes, timed, by NCCL or gloo, and how far this node's clock is from the median of all, in seconds."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if use_gpu else "gloo"
    rank = int(os.environ["SLURM_NODEID"])
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    dist.init_process_group(
        f"cpu:gloo,cuda:{backend}" if use_gpu else backend,
        init_method=f"tcp://{arguments.endpoint}",
        rank=rank,
        world_size=arguments.nodes,
        timeout=_TIMEOUT,
    )
    try:
        data = torch.ones(_REDUCED[backend], device=device)
        seconds = []
        for _ in range(4):  # the first makes the connections
            data.fill_(1.0)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(data)
            total = float(data[-1])  # waits for a device
            seconds.append(time.perf_counter() - began)
            if total != arguments.nodes:
                raise RuntimeError(f"the sum over {arguments.nodes} nodes came out as {total}")
        clocks = [torch.zeros((), dtype=torch.float64) for _ in range(arguments.nodes)]
        dist.barrier()
        dist.all_gather(clocks, torch.tensor(time.time(), dtype=torch.float64))
        median = float(torch.stack(clocks).median())
        return {
            "backend": backend,
            "all_reduce_bytes": data.numel() * data.element_size(),
            "all_reduce_seconds": round(min(seconds[1:]), 6),
            "clock_offset_seconds": round(float(clocks[rank]) - median, 3),
        }
    finally:
        dist.destroy_process_group()


def _examine_gpus(expected: int) -> list[str]:
    import torch

    count = torch.cuda.device_count()
    if count < expected:
        return [f"{count} of {expected} GPUs can be used"]
    errors = []
    for index in range(expected):
        try:
            total = float(torch.ones(2**20, device=f"cuda:{index}").sum())
        except RuntimeError as error:
            errors.append(f"GPU {index} fails: {str(error).partition(chr(10))[0]}")
        else:
            if total != 2**20:
                errors.append(f"GPU {index} computes wrongly: a sum of {2**20} came out as {total}")
    return errors


def _say(found: dict[str, Any]) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(found)}\n")  # one write: srun joins what the nodes print
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
