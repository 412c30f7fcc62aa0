"""The description of a cluster: its nodes, and how jobs are submitted there. One YAML file for `launch`, `plan` and `profile`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megamem.config import at_least, build, merge, parse_override, to_dict
from megamem.errors import ConfigError
from megamem.files import write_text
from megamem_launch.config import read_yaml
from megamem_launch.plan.hardware import HardwareConfig
from megamem_launch.slurm.secrets import holds_secret, is_secret

_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_OWN_DIRECTIVES = {
    **{f"--{name}": f"slurm.{name}" for name in ("account", "constraint", "exclude", "exclusive", "partition", "qos")},
    **{f"--{name}": f"slurm.{name}" for name in ("requeue", "reservation", "time")},
    **{f"--{name}": "gpus_per_node" for name in ("gpus", "gpus-per-node", "gpus-per-task", "gres")},
    **{f"--{name}": "slurm.memory" for name in ("mem", "mem-per-cpu", "mem-per-gpu")},
    **{f"--{name}": "ranks_per_node" for name in ("ntasks", "ntasks-per-node")},
    **{f"--{name}": "nothing: logs are kept with the run" for name in ("error", "output")},
    "--array": "--sweep of `megamem launch slurm`",
    "--chdir": "the directory that you submit from",
    "--cpus-per-task": "cpus_per_node",
    "--dependency": "--chain of `megamem launch slurm`",
    "--export": "slurm.environment",
    "--hold": "nothing: the launcher holds and releases jobs itself",
    "--job-name": "name of the run",
    "--no-requeue": "slurm.requeue",
    "--nodes": "nodes",
    "--open-mode": "nothing: logs are always appended to",
    "--signal": "slurm.signal and slurm.signal_seconds",
}


@dataclass(kw_only=True, slots=True)
class ContainerConfig:
    """``slurm.container``: what the ranks run in. The supervisor runs outside, where SLURM's commands are."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """``pyxis``: the options ``--container-*`` that its plugin gives to srun. ``apptainer``: ``apptainer exec`` before ranks."""
    image: str = ""
    """Image, as ``--container-image`` of pyxis or ``apptainer exec`` takes it: a file, or a name in a registry."""
    mounts: list[str] = field(default_factory=list)
    """``HOST``, ``HOST:INSIDE`` or ``HOST:INSIDE:ro``. The run, the data, ``memory.disk.path`` and the
    directory that you submit from are added."""
    workdir: str = ""
    """Directory inside that the ranks start in; empty for the one that you submit from."""
    environment: list[str] = field(default_factory=list)
    """Names of variables whose value outside goes before the image's own. All others pass where the image does not set them."""
    python: str = "python"
    """Interpreter inside, which has megamem."""
    options: list[str] = field(default_factory=list)
    """Further options: of srun (``--no-container-mount-home``) or of ``apptainer exec`` (``--cleanenv``)."""

    def __post_init__(self) -> None:
        if (self.kind == "none") != (not self.image):
            raise ConfigError(
                f"kind is {self.kind} and image is {self.image!r}; set both for a container, or neither for none"
            )
        for name in self.environment:
            _check_variable("environment", name)
        for mount in self.mounts:
            if not 1 <= len(mount.split(":")) <= 3 or "," in mount:
                raise ConfigError(f"mounts has {mount!r}; set HOST, HOST:INSIDE or HOST:INSIDE:ro, without commas")
        for text in (self.image, *self.options):
            _check_no_secret("image and options", text)


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """``slurm``: what jobs ask of SLURM, and how their supervisor behaves."""

    partition: str = ""
    """Partition; empty for the cluster's default."""
    account: str = ""
    """Account that is charged; empty for the user's default."""
    qos: str = ""
    """Quality of service; empty for the default."""
    time: str = ""
    """Time limit of one job, as SLURM writes it: minutes, HH:MM:SS or D-HH:MM:SS, in quotes. Empty for the partition's."""
    constraint: str = ""
    """Features that nodes must have."""
    reservation: str = ""
    """Reservation to run in."""
    exclude: str = ""
    """Nodes never to use, such as ``node[3,7]``."""
    exclusive: bool = True
    """Take whole nodes."""
    memory: str = ""
    """Host memory of a node, such as ``500G``; ``0`` for all of it, empty for the partition's default."""
    mode: Literal["torchrun", "srun"] = "torchrun"
    """``torchrun``: one task of SLURM per node starts its ranks. ``srun``: every rank is a task of SLURM."""
    signal: Literal["USR1", "USR2"] = "USR1"
    """Signal that SLURM sends to the supervisor before the time limit."""
    signal_seconds: int = 120
    """Seconds before the time limit that it is sent, by SLURM's clock up to a minute earlier: time for a step and a checkpoint."""
    requeue: bool = True
    """Go on in the same job after the time limit, preemption and the loss of a node."""
    restarts: int = 3
    """Restarts after which a run gives up that has not saved a new checkpoint between them."""
    hang_seconds: int = 300
    """Seconds in which no rank gets on after which all are stopped and started again; 0 waits for ever. A checkpoint may take four
    times as long. Keep it below memory.timeout_seconds, after which ranks fail without saying who was late."""
    start_seconds: int = 900
    """Seconds without progress that ranks may take before their first step is done: imports, compiling, reading a checkpoint."""
    preflight: bool = True
    """Check devices, disks, clocks and the network between the nodes before the ranks start."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that the job runs first, such as ``module load cuda``."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, on top of those of the shell that submits. Kept with the run, so no secrets."""
    python: str = ""
    """Interpreter that has megamem on the nodes; empty for the one that submits."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    directives: list[str] = field(default_factory=list)
    """Further options of sbatch, one each, such as ``--mail-type=FAIL``."""

    def __post_init__(self) -> None:
        at_least(self, 0, "signal_seconds", "restarts", "hang_seconds")
        at_least(self, 1, "start_seconds")
        for name in ("partition", "account", "qos", "constraint", "reservation", "exclude", "python"):
            _check_line(name, getattr(self, name))
        if self.time and not _TIME.fullmatch(self.time):
            raise ConfigError(f'time is {self.time!r}; set minutes, "HH:MM:SS" or "D-HH:MM:SS"')
        if self.memory and not _MEMORY.fullmatch(self.memory):
            raise ConfigError(f"memory is {self.memory!r}; set a size per node such as 500G, or 0 for all of it")
        if self.signal_seconds > 65535:
            raise ConfigError(f"signal_seconds is {self.signal_seconds}; set at most 65535, as SLURM takes no more")
        for name, value in self.environment.items():
            _check_variable("environment", name)
            if is_secret(name, value):
                raise ConfigError(
                    f"environment.{name} looks like a secret, and would be kept with the run; export it in the shell that "
                    "submits, which the job inherits, or let a line of setup read it from a file"
                )
        for line in self.setup:
            _check_no_secret("setup", line)
        for directive in self.directives:
            _check_line("directives", directive)
            _check_no_secret("directives", directive)
            if not directive.startswith("--"):
                raise ConfigError(f"directives has {directive!r}; set long options of sbatch, such as --mail-type=FAIL")
            option = re.split(r"[=\s]", directive, maxsplit=1)[0]
            own = option if option in _OWN_DIRECTIVES else next(filter(_abbreviated_as(option), _OWN_DIRECTIVES), "")
            if own:
                raise ConfigError(
                    f"directives has {directive!r}, which the launcher writes itself; use {_OWN_DIRECTIVES[own]}"
                )


@dataclass(kw_only=True, slots=True)
class Cluster:
    """Equal nodes, what is in them, and how to get them."""

    name: str = "cluster"
    """What people call it."""
    nodes: int = 1
    """Nodes of one job."""
    gpus_per_node: int = 0
    """GPUs of a node; 0 where ranks compute on CPUs."""
    ranks_per_node: int = 0
    """Ranks of a node; 0 for one on each GPU, or one on a node without any."""
    cpus_per_node: int = 1
    """Cores of a node that a job gets."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "nodes", "cpus_per_node")
        at_least(self, 0, "gpus_per_node", "ranks_per_node")
        self.ranks_per_node = self.ranks_per_node or self.gpus_per_node or 1
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ConfigError(
                f"ranks_per_node is {self.ranks_per_node}, but a node has gpus_per_node={self.gpus_per_node}, and a GPU takes "
                "one rank; lower it"
            )
        if self.ranks_per_node > self.cpus_per_node:
            raise ConfigError(
                f"ranks_per_node is {self.ranks_per_node}, but cpus_per_node={self.cpus_per_node}; set at least one core for "
                "each rank"
            )

    @property
    def time_seconds(self) -> int | None:
        """``slurm.time`` in seconds; None where it is the partition's, or none."""
        time = self.slurm.time
        if not time or time.upper() == "UNLIMITED" or time == "0":
            return None
        days, dash, clock = time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if dash:  # hours, hours:minutes, hours:minutes:seconds
            hours, minutes, seconds = (parts + [0, 0])[:3]
        else:  # minutes, minutes:seconds, hours:minutes:seconds
            hours, minutes, seconds = parts if len(parts) == 3 else (0, *(parts + [0])[:2])
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_per_node


def load_cluster(path: str | Path, overrides: Sequence[str] = (), options: Sequence[str] = ()) -> Cluster:
    """Read a description and apply overrides such as ``slurm.partition=gpu``. ``options``: what people wrote for each, such as
    ``--partition gpu``, which errors then name.

    Raises:
        ConfigError: there is no such file, or a setting is unknown, of another type, or does not fit the others.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"no cluster description at {path}; give the YAML file of one, such as those in configs/clusters"
        )
    data = read_yaml(path)
    if not data:
        raise ConfigError(f"{path} is empty; describe the cluster in it, as the files in configs/clusters do")
    stages = [data]
    for text in overrides:
        stages.append(merge(stages[-1], parse_override(text)))
    try:
        return build_cluster(stages[-1], str(path))
    except ConfigError:
        for stage, origin in zip(stages, [str(path), *(options or overrides)], strict=True):
            build_cluster(stage, origin)  # the first that fails is to blame
        raise


def build_cluster(data: dict[str, Any], origin: str) -> Cluster:
    """The description that plain data gives; errors name ``origin``."""
    slurm = data.get("slurm")
    if isinstance(slurm, dict):
        if isinstance(slurm.get("time"), int):  # YAML 1.1 reads 10:30:00 as a number of base 60
            raise ConfigError(f'{origin}: slurm.time must stand in quotes, such as "24:00:00"')
        if isinstance(slurm.get("memory"), int):
            data = merge(data, {"slurm.memory": str(slurm["memory"])})
    try:
        return build(Cluster, data)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def save_cluster(cluster: Cluster, path: Path) -> None:
    """Write the resolved description; :func:`load_cluster` of the file gives an equal one."""
    heading = "# Resolved description of the cluster that this was submitted to.\n"
    write_text(path, heading + yaml.safe_dump(to_dict(cluster), sort_keys=False))


def with_mounts(cluster: Cluster, workdir: Path, read: Sequence[Path], written: Sequence[Path]) -> Cluster:
    """The same cluster, whose container also sees ``workdir`` and what is ``read`` and ``written``, absolute, under their own
    names, and starts in ``workdir`` where its description names no other. What is written needs a mount that is not ``:ro``."""
    container = cluster.slurm.container
    if container.kind == "none":
        return cluster
    parts = [mount.split(":") for mount in container.mounts]
    same = [part for part in parts if len(part) == 1 or part[0] == part[1]]
    seen = [Path(part[0]) for part in same]
    writable = [Path(part[0]) for part in same if len(part) < 3 or "ro" not in part[2].split("+")]
    mounts = list(container.mounts)
    for paths, parents in (((workdir, *read), seen), (written, writable)):
        for path in paths:
            if not any(path.is_relative_to(parent) for parent in parents):
                seen.append(path)
                writable.append(path)
                mounts.append(str(path))
    changed = dataclasses.replace(container, mounts=mounts, workdir=container.workdir or str(workdir))
    return dataclasses.replace(cluster, slurm=dataclasses.replace(cluster.slurm, container=changed))


def _check_line(name: str, value: str) -> None:
    if "\n" in value or "\r" in value:
        raise ConfigError(f"{name} is {value!r}; set one line")


def _check_no_secret(name: str, text: str) -> None:
    if holds_secret(text):
        raise ConfigError(
            f"{name} has what looks like a secret, and would be kept with the run; export it in the shell that submits, which the "
            "job inherits, or let a line of setup read it from a file"
        )


def _abbreviated_as(option: str) -> Callable[[str], bool]:
    """sbatch takes any beginning of an option that no other has."""
    return lambda own: len(option) > 3 and own.startswith(option)


def _check_variable(name: str, variable: str) -> None:
    if not _VARIABLE.fullmatch(variable):
        raise ConfigError(f"{name} names {variable!r}; set names of variables, made of letters, digits and _")
