"""How much host memory is free, as the system and the control group of this process see it."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_host_bytes() -> int:
    """Host memory that this process could still get. Other processes may take it first."""
    return min(_machine(), _control_group())


def _machine() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63


def _control_group() -> int:
    """Room under the tightest limit of the version 2 control groups that hold this process; no bound where there is none."""
    free = 2**63
    try:
        entries = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next(entry[3:] for entry in entries if entry.startswith("0::"))
    except (OSError, StopIteration):
        return free
    group = _CGROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(_CGROUPS):
            break
        try:
            limit = (folder / "memory.max").read_text(encoding="ascii").strip()
            if limit == "max":
                continue
            usage = int((folder / "memory.current").read_text(encoding="ascii"))
            kinds = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue
        cache = int(kinds.get("file", 0)) - int(kinds.get("shmem", 0))  # given up when memory runs short
        free = min(free, int(limit) - usage + cache)
    return max(free, 0)
