"""Batch scripts: what a job asks of SLURM, and the one command that it becomes."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2

from megamem.errors import ConfigError
from megamem_launch.cluster import Cluster
from megamem_launch.slurm.container import container_variables

_TASK = '"${tasks[SLURM_ARRAY_TASK_ID]}"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """A job before it is text."""

    name: str
    """Name of the job."""
    comment: tuple[str, ...]
    """Lines that say to a reader what the job does."""
    workdir: Path
    """Absolute directory that the job starts in."""
    logs: Path
    """Absolute directory of its output."""
    command: tuple[str, ...]
    """What the script ends as, unquoted."""
    tasks: tuple[str, ...] = ()
    """For an array: the last argument of ``command``, for each task its own."""
    at_once: int = 0
    """Tasks of an array that may run at a time; 0 for all."""
    nodes: int = 0
    """Nodes; 0 for the cluster's."""
    supervised: bool = True
    """Whether the job is signalled before its end and holds the ranks of the cluster's nodes; if not it is one task on cores."""


def render(cluster: Cluster, script: Script) -> str:
    """The text of a batch script. Raises ConfigError for a path that a directive cannot hold."""
    slurm = cluster.slurm
    environment = {name: shlex.quote(value) for name, value in slurm.environment.items()}
    environment |= {name: f'"${{{source}-}}"' for name, source in container_variables(cluster).items()}
    command = shlex.join(script.command)
    loader = jinja2.PackageLoader("megamem_launch.slurm", ".")
    template = jinja2.Environment(loader=loader, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return template.get_template("job.sbatch.j2").render(
        directives=_directives(cluster, script),
        comment=script.comment,
        warning=slurm.signal if script.supervised else "",
        environment=list(environment.items()),
        setup=slurm.setup,
        tasks=[shlex.quote(task) for task in script.tasks],
        command=f"{command} {_TASK}" if script.tasks else command,
    )


def interpreter(cluster: Cluster) -> str:
    """The Python of the job itself, outside of containers."""
    return cluster.slurm.python or sys.executable


def _directives(cluster: Cluster, script: Script) -> list[str]:
    slurm = cluster.slurm
    per_node = cluster.ranks_per_node if script.supervised and slurm.mode == "srun" else 1
    options: dict[str, str | int] = {
        "job-name": script.name,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": script.nodes or cluster.nodes,
        "ntasks-per-node": per_node,
        "cpus-per-task": cluster.cpus_per_node // per_node,
        "gres": f"gpu:{cluster.gpus_per_node}" if script.supervised and cluster.gpus_per_node else "",
        "mem": slurm.memory,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "exclude": slurm.exclude,
        "chdir": _path(script.workdir),
        # A job keeps its id when it is requeued, so its log is appended to.
        "output": _path(script.logs).replace("%", "%%") + ("/slurm-%A_%a.log" if script.tasks else "/slurm-%j.log"),
        "open-mode": "append",
        # The shell's variables, whatever the cluster's default; the launcher has removed those of an outer job.
        "export": "ALL",
    }
    if script.tasks:
        limit = f"%{script.at_once}" if script.at_once else ""
        options["array"] = f"0-{len(script.tasks) - 1}{limit}"
    if script.supervised and slurm.signal_seconds:
        options["signal"] = f"B:{slurm.signal}@{slurm.signal_seconds}"
    lines = [f"--{name}={_quote(str(value))}" for name, value in options.items() if value != ""]
    lines.append("--requeue" if slurm.requeue else "--no-requeue")
    if slurm.exclusive and script.supervised:
        lines.append("--exclusive")
    return [*lines, *slurm.directives]


def _quote(value: str) -> str:
    """SLURM splits directives at spaces and cuts them at `#`, but for what stands in quotes."""
    return shlex.quote(value) if set(value) & set(" \t#'\"\\") else value


def _path(path: Path) -> str:
    text = str(path)
    if "\n" in text or "'" in text or "\\" in text:
        raise ConfigError(
            f"{text!r} cannot stand in a batch script; use a path without line breaks, quotes and backslashes"
        )
    return text
