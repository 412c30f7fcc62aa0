"""Where the tiers of one rank find their memory and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megamem.errors import TierError
from megamem.memory.config import DiskConfig
from megamem.memory.tiers.base import RowStore, record_bytes
from megamem.memory.tiers.disk import DiskStore
from megamem.memory.tiers.resident import open_device, open_host
from megamem_kernels.formats import Field

TierName = Literal["device", "host", "disk"]


@dataclass(frozen=True, kw_only=True)
class TierResources:
    """Memory and files of one rank."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The accelerator. Host rows are pinned where it is a CUDA device; on a CPU machine its memory is the host's."""
    host_memory: Literal["private", "shared"] = "private"
    """``memory.host_memory``."""
    disk: DiskConfig = field(default_factory=DiskConfig)
    """``memory.disk``."""
    disk_root: Path | None = None
    """Directory of this run's disk files on this node; it is made when first needed. None: no disk tier."""
    disk_bytes: int = 0
    """Size of all disk stores of this rank together (:func:`megamem.memory.spec.disk_bytes`): each gets the part of the
    cache that it has of them. 0: each gets all of it."""
    resume: str = ""
    """Label of the checkpoint that is about to be loaded with its optimizer state: disk files that were committed under it
    are kept as they are, all others are made anew."""

    def open(
        self, tier: TierName, name: str, fields: tuple[Field, ...], records: int, *, pin: bool = False
    ) -> RowStore:
        """A store of ``records`` records, zero unless :attr:`RowStore.committed` says that they were kept.

        Args:
            tier: Which memory.
            name: Unique on this node among the stores of the run: names its files, and the store in errors.
            fields: Of a record.
            records: Their number.
            pin: Whether the accelerator reads host memory of this store directly.

        Raises:
            TierError: there is no room, or a file cannot be used.
        """
        if tier == "device" and self.device.type != "cpu":
            return open_device(name, fields, records, self.device)
        if tier != "disk":
            pin = pin and self.device.type == "cuda"
            return open_host(name, fields, records, kind=self.host_memory, pin=pin)
        if self.disk_root is None:
            raise TierError(f"{name} is on the disk tier, which has no directory; set memory.disk.path")
        cache = self.disk.cache_gib * 2**30
        if self.disk_bytes:
            cache *= records * record_bytes(fields) / self.disk_bytes
        return DiskStore(
            self.disk_root / name,
            fields,
            records,
            cache_bytes=int(cache),
            queue_depth=self.disk.queue_depth,
            resume=self.resume,
        )
