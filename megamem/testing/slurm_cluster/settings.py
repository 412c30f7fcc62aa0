"""What a cluster is made of, and the files that SLURM reads."""

from __future__ import annotations

import json
import os
import pwd
import random
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megamem.testing.slurm_cluster.packages import slurm_version

_PORTS = range(28000, 32700)  # below those that the kernel hands out by itself, above those at which runs meet


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One cluster; kept as ``cluster.json`` in its directory, so that another process can attach to it."""

    nodes: tuple[str, ...]
    """Names."""
    cpus: int
    """That each node claims; more than the machine has is fine."""
    memory_mb: int
    """That each node claims."""
    gpus: int
    """Fake GPUs of each node: counted and numbered in CUDA_VISIBLE_DEVICES, and nothing else."""
    isolated: bool
    """Whether every node has process, host name and mount namespaces of its own."""
    port: int
    """slurmctld's; the nodes have those that follow."""
    subnet: int
    """Node i has the address 127.SUBNET.0.i+1."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Lines of slurm.conf."""

    def address(self, node: str) -> str:
        """The node's own address, on the loopback device."""
        return f"127.{self.subnet}.0.{self.nodes.index(node) + 1}"


def free_ports(count: int) -> int:
    """First of ``count`` consecutive TCP ports that nobody listens on."""
    generator = random.Random(os.getpid() ^ time.monotonic_ns())
    for _ in range(200):
        first = generator.randrange(_PORTS.start, _PORTS.stop - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise RuntimeError(f"no {count} consecutive free ports between {_PORTS.start} and {_PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def save(settings: Settings, directory: Path) -> None:
    """Write ``cluster.json``."""
    (directory / "cluster.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def load(directory: Path) -> Settings:
    """Read ``cluster.json``; FileNotFoundError where no cluster was started in ``directory``."""
    value = json.loads((directory / "cluster.json").read_text(encoding="utf-8"))
    return Settings(**value | {"nodes": tuple(value["nodes"])})


def write_files(settings: Settings, directory: Path) -> None:
    """Everything that the daemons read, below ``directory``/etc; and the directories they write."""
    for name in ("etc", "log", "run", "state", "spool", "dev", "tmp"):
        (directory / name).mkdir(exist_ok=True)
    etc = directory / "etc"
    key = etc / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    (etc / "slurm.conf").write_text(_slurm_conf(settings, directory), encoding="utf-8")
    # slurmd always loads a cgroup plugin: newer ones can be told not to, the old one that is never used does no harm.
    plugin = "disabled" if slurm_version() >= (23, 11) else "cgroup/v1"
    (etc / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n", encoding="utf-8")
    hosts = ["127.0.0.1 localhost", *(f"{settings.address(node)} {node}" for node in settings.nodes)]
    (etc / "hosts").write_text("\n".join(hosts) + "\n", encoding="utf-8")
    gres = ["AutoDetect=off"]
    if settings.gpus:
        for gpu in range(settings.gpus):
            # A device is numbered only if it is one: links to /dev/null pass, plain files do not.
            (directory / "dev" / f"fakegpu{gpu}").symlink_to("/dev/null")
        files = f"{directory}/dev/fakegpu[0-{settings.gpus - 1}]" if settings.gpus > 1 else f"{directory}/dev/fakegpu0"
        names = ",".join(settings.nodes)
        gres.append(f"NodeName={names} Name=gpu Type=fake Flags=nvidia_gpu_env File={files}")
    (etc / "gres.conf").write_text("\n".join(gres) + "\n", encoding="utf-8")


def _slurm_conf(settings: Settings, directory: Path) -> str:
    user = pwd.getpwuid(os.getuid()).pw_name
    values = {
        "ClusterName": f"test{settings.port}",
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmctldPort": str(settings.port),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={directory}/run/munge.socket",
        "CredType": "cred/munge",
        "StateSaveLocation": f"{directory}/state",
        "SlurmdSpoolDir": f"{directory}/spool/%n",
        "SlurmctldPidFile": f"{directory}/run/slurmctld.pid",
        "SlurmdPidFile": f"{directory}/run/slurmd-%n.pid",
        "SlurmctldLogFile": f"{directory}/log/slurmctld.log",
        "SlurmdLogFile": f"{directory}/log/slurmd-%n.log",
        "TmpFS": f"{directory}/tmp",
        "MailProg": "/bin/true",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": str(max(settings.memory_mb // settings.cpus, 1)),
        "SlurmdParameters": "config_overrides",
        "SlurmctldParameters": "preempt_send_user_signal",
        "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=10000,sched_interval=2,bf_interval=2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": "1",
        # 1: a lost node that comes back serves again, one that a person set down does not.
        "ReturnToService": "1",
        "SlurmdTimeout": "60",
        "KillWait": "10",
        # Ended jobs stay visible to scontrol: no accounting database is needed.
        "MinJobAge": "86400",
        # From the clock, so that files named after jobs of two clusters differ.
        "FirstJobId": str(int(time.time()) % 50_000_000 + 1000),
        "MaxJobId": "67000000",
    }
    if settings.gpus:
        values["GresTypes"] = "gpu"
    lines = [f"{name}={value}" for name, value in (values | settings.overrides).items()]
    gres = f" Gres=gpu:fake:{settings.gpus}" if settings.gpus else ""
    for number, node in enumerate(settings.nodes, start=1):
        lines.append(
            f"NodeName={node} NodeAddr={settings.address(node)} Port={settings.port + number} "
            f"CPUs={settings.cpus} RealMemory={settings.memory_mb}{gres} State=UNKNOWN"
        )
    lines += [
        "PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF MaxTime=1-0 State=UP",
        "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=1-0 State=UP",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=1-0 State=UP",
    ]
    return "\n".join(lines) + "\n"
