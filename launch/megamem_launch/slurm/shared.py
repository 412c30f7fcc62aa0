"""Whether other nodes see a path: what can be told of it from the machine that submits."""

from __future__ import annotations

from pathlib import Path

import psutil

_LOCAL = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
_MEMORY = {"tmpfs", "ramfs"}


def local_notes(setting: str, path: Path) -> list[str]:
    """A warning where ``path``, which ``setting`` gives, most likely exists on this machine alone; else nothing."""
    resolved = path.resolve()
    local = any(resolved.is_relative_to(folder) for folder in _LOCAL) or _file_system(resolved) in _MEMORY
    if not local:
        return []
    return [f"{path} looks like a directory of this machine alone; set {setting} to a path that all nodes share"]


def _file_system(path: Path) -> str:
    """Type of the file system that holds ``path``, which need not exist; empty where it cannot be told."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), "")
