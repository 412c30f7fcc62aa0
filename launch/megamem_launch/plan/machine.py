"""The machine that this runs on, as a cluster of one node."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megamem.memory.tiers.limits import available_host_bytes
from megamem_launch.cluster import Cluster
from megamem_launch.plan.hardware import HardwareConfig

_GIB = 2**30


def local_hardware(disk: Path) -> HardwareConfig:
    """What this machine has free; without ceilings. ``disk``: a directory, which need not exist yet, on the disk that counts."""
    import torch

    device, memory = "cpu", 0.0
    if torch.cuda.is_available():
        device, memory = (
            torch.cuda.get_device_name(),
            min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())) / _GIB,
        )
    return HardwareConfig(
        device=device,
        device_memory_gib=round(memory, 2),
        host_memory_gib=round(available_host_bytes() / _GIB, 2),
        disk_gib=round(shutil.disk_usage(_existing(disk)).free / _GIB, 2),
    )


def local_cluster(ranks: int, disk: Path) -> Cluster:
    """This machine with ``ranks`` ranks, whose tables are below ``disk``. More ranks than it has cores share them, as
    ``megamem train`` lets them."""
    import torch

    cores = len(os.sched_getaffinity(0))
    return Cluster(
        name="this machine",
        gpus_per_node=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        ranks_per_node=ranks,
        cpus_per_node=max(cores, ranks),
        hardware=local_hardware(disk),
    )


def _existing(path: Path) -> Path:
    """``path``, or the nearest directory above it that is there."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())
