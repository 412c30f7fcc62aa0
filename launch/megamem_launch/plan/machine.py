"""The machine that this runs on, as a cluster of one node."""

from __future__ import annotations

import os
import shutil

from megamem.memory.tiers.limits import available_host_bytes
from megamem_launch.cluster import Cluster
from megamem_launch.plan.hardware import HardwareConfig

_GIB = 2**30


def local_hardware() -> HardwareConfig:
    """What this machine has free; without ceilings."""
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
        disk_gib=round(shutil.disk_usage(".").free / _GIB, 2),
    )


def local_cluster(ranks: int) -> Cluster:
    """This machine with ``ranks`` ranks. More than it has cores share them, as ``megamem train`` lets them."""
    import torch

    cores = len(os.sched_getaffinity(0))
    return Cluster(
        name="this machine",
        gpus_per_node=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        ranks_per_node=ranks,
        cpus_per_node=max(cores, ranks),
        hardware=local_hardware(),
    )
