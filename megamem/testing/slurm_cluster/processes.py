"""Which processes belong to a cluster, from /proc alone: no list of ids can be out of date."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

INIT = "megamem-node"
"""Last argument of a node's process 1 and of its parent."""
PAUSE = ("sleep", "31536001")
"""What process 1 waits for."""
_DAEMONS = ("slurmd", "slurmctld", "munged", "nsenter")


@dataclass(frozen=True)
class Process:
    """A process that lives (zombies do not)."""

    pid: int
    parent: int
    node: str | None
    """None for slurmctld and munged."""
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the program, without its directory."""
        return os.path.basename(self.argv[0]) if self.argv else ""

    @property
    def is_job(self) -> bool:
        """Whether a job started it: neither a daemon, nor slurmstepd, nor what makes up a node."""
        return not (self.name in _DAEMONS or self.is_step or self.argv[-1:] == (INIT,) or self.argv == PAUSE)

    @property
    def is_step(self) -> bool:
        """Whether it is slurmstepd, whose argv[0] also tells the step."""
        return self.name.startswith("slurmstepd")


def find(directory: Path) -> list[Process]:
    """All living processes of the cluster in ``directory``.

    Those that carry its SLURM_CONF together with the name of a node (daemons and what they start), those that have the log of a
    node open (newer slurmstepd overwrite their environment), and all that share a node's process namespace.
    """
    configuration = f"SLURM_CONF={directory}/etc/slurm.conf"
    own_namespace = _link("/proc/self/ns/pid")
    found: dict[int, tuple[int, str | None, tuple[str, ...]]] = {}
    others: dict[int, tuple[int, str, tuple[str, ...]]] = {}
    namespaces: dict[str, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        try:
            parent = _parent_if_alive(pid)
            if parent is None:
                continue
            argv = tuple(_read(pid, "cmdline").rstrip("\0").split("\0"))
            environment = _read(pid, "environ").split("\0")
        except OSError:
            continue
        namespace = _link(f"/proc/{pid}/ns/pid")
        node = next((v.partition("=")[2] for v in environment if v.startswith("SLURMD_NODENAME=")), None)
        if configuration not in environment:
            node = _logged_node(pid, directory) if argv[0].startswith("slurmstepd") else None
        elif os.path.basename(argv[0]) in ("slurmctld", "munged"):
            found[pid] = (parent, None, argv)
            continue
        if node is None:
            others[pid] = (parent, namespace, argv)
            continue
        found[pid] = (parent, node, argv)
        if namespace != own_namespace:
            namespaces[namespace] = node
    for pid, (parent, namespace, argv) in others.items():
        if namespace in namespaces:
            found[pid] = (parent, namespaces[namespace], argv)
    return [Process(pid, *rest) for pid, rest in sorted(found.items())]


def kill(directory: Path, node: str | None = None, timeout: float = 20.0) -> None:
    """SIGKILL every process of the cluster, or of one of its nodes, and return when none lives.

    TimeoutError where some do not die within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while remaining := [p for p in find(directory) if node is None or p.node == node]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes of {directory} do not die: {remaining}")
        for process in remaining:
            signal_process(process.pid, signal.SIGKILL)
        time.sleep(0.02)


def signal_process(pid: int, number: int) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _parent_if_alive(pid: int) -> int | None:
    state, parent = _read(pid, "stat").rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(parent)


def _logged_node(pid: int, directory: Path) -> str | None:
    prefix = f"{directory}/log/slurmd-"
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return None
    for descriptor in descriptors:
        target = _link(f"/proc/{pid}/fd/{descriptor}")
        if target.startswith(prefix):
            return target.removeprefix(prefix).removesuffix(".log")
    return None
