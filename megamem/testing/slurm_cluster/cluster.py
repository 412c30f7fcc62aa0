"""The cluster as a test holds it: start, look, break, mend, stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from megamem.testing.slurm_cluster import keeper, nodes, processes, settings
from megamem.testing.slurm_cluster.packages import missing_packages, search_path
from megamem.testing.slurm_cluster.processes import Process
from megamem.testing.slurm_cluster.settings import Settings

ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
"""States that a job does not leave."""
_FIELD = re.compile(r"([A-Za-z][\w:/]*)=(.*?)(?=\s+[A-Za-z][\w:/]*=|$)")


class ClusterError(RuntimeError):
    """The cluster did not do in time what was asked of it; the message ends with what its logs say."""


class SlurmCluster:
    """A SLURM cluster whose processes and files all belong to one directory.

    Partitions: ``main`` (default), ``low`` (its jobs are requeued, after a grace time of 20 s, when a job of another partition
    needs their nodes) and ``high`` (before all). Node names are ``node1``, ``node2``, ...
    """

    def __init__(self, directory: Path, of: Settings) -> None:
        self.directory = directory
        self.settings = of
        self.start_seconds = 0.0
        """From ``start`` until all nodes were idle."""
        self._children: list[subprocess.Popen[bytes]] = []
        self._keeper: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        directory: Path,
        nodes: int = 2,
        *,
        cpus: int = 4,
        memory_mb: int = 8000,
        gpus: int = 2,
        isolate: Literal["auto", "namespaces", "none"] = "auto",
        keep: bool = True,
        overrides: Mapping[str, str] | None = None,
    ) -> SlurmCluster:
        """Start a cluster in ``directory``, which is made, and return when all nodes are idle.

        Args:
            directory: Keep its path short: it holds a socket, whose path has at most 107 characters.
            nodes: Virtual nodes, each of ``cpus``, ``memory_mb`` and ``gpus`` (fake ones), whatever this machine has.
            isolate: ``namespaces`` of its own for every node, ``none``, or ``auto``: namespaces where the kernel allows them.
            keep: End the cluster when this process ends, however it does.
            overrides: Lines of slurm.conf, such as ``{"SlurmdTimeout": "3"}``.

        Raises:
            FileNotFoundError: A package is missing; see ``missing_packages``.
            ClusterError: ``directory`` has the files of a cluster already, or the nodes did not become idle in time.
        """
        if missing := missing_packages():
            raise FileNotFoundError(f"install the Debian packages {' '.join(missing)}")
        begun = time.monotonic()
        if (directory / "etc").exists():
            raise ClusterError(f"{directory} has the files of a cluster already; stop that one and remove them")
        directory.mkdir(parents=True, exist_ok=True)
        of = Settings(
            nodes=tuple(f"node{number}" for number in range(1, nodes + 1)),
            cpus=cpus,
            memory_mb=memory_mb,
            gpus=gpus,
            isolated=isolate != "none",
            port=settings.free_ports(nodes + 1),
            subnet=1 + os.getpid() % 254,
            overrides=dict(overrides or {}),
        )
        cluster = cls(directory.resolve(), of)
        settings.write_files(of, cluster.directory)
        if keep:
            cluster._keeper = keeper.start(cluster.directory)
        try:
            cluster._start_daemons(isolate)
        except BaseException:
            cluster.stop()
            raise
        cluster.start_seconds = time.monotonic() - begun
        return cluster

    @classmethod
    def attach(cls, directory: Path) -> SlurmCluster:
        """The running cluster of another process; it is not ended with this one."""
        return cls(directory.resolve(), settings.load(directory.resolve()))

    def __enter__(self) -> SlurmCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return self.settings.nodes

    @property
    def env(self) -> dict[str, str]:
        """This process's environment, in which SLURM's commands talk to this cluster."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_"))}
        return inherited | {"PATH": search_path(), "SLURM_CONF": f"{self.directory}/etc/slurm.conf"}

    # What is going on

    def run(self, command: list[str], *, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command in ``env``; ClusterError with its output where it fails and ``check`` is set."""
        done = subprocess.run(
            command, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}".strip())
        return done

    def sbatch(self, script: str, *options: str) -> int:
        """Submit ``script`` (without its first line) with ``options``; the job's id. Output goes to DIR/tmp/<job id>.out."""
        path = self.directory / "tmp" / f"job-{time.monotonic_ns()}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        output = f"--output={self.directory}/tmp/%j.out"
        return int(self.run(["sbatch", "--parsable", output, "--open-mode=append", *options, str(path)]).stdout)

    def output(self, job: int) -> str:
        """What a job of ``sbatch`` has printed so far."""
        path = self.directory / "tmp" / f"{job}.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def job(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` says, by field."""
        return dict(_FIELD.findall(self.run(["scontrol", "--oneliner", "show", "job", str(job)]).stdout.strip()))

    def jobs(self) -> list[dict[str, str]]:
        """All jobs, ended ones too."""
        lines = self.run(["scontrol", "--oneliner", "show", "job"], check=False).stdout.splitlines()
        return [dict(_FIELD.findall(line)) for line in lines if line.startswith("JobId=")]

    def node_state(self, node: str) -> str:
        """For example ``IDLE``, ``ALLOCATED``, ``DOWN*`` (does not answer) or ``IDLE+DRAIN``."""
        return dict(_FIELD.findall(self.run(["scontrol", "--oneliner", "show", "node", node]).stdout))["State"]

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        """Return when ``condition`` holds; ClusterError that tells ``what`` was awaited after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {timeout:.0f} s for {what}\n{self._situation()}")
            time.sleep(0.05)

    def wait_state(self, job: int, states: Collection[str], timeout: float = 60.0) -> dict[str, str]:
        """Wait until a job is in one of ``states``; what ``job`` then says. ClusterError as soon as it ended in another."""
        seen: dict[str, str] = {}

        def reached() -> bool:
            seen.update(self.job(job))
            if seen["JobState"] in ENDED and seen["JobState"] not in states:
                raise ClusterError(
                    f"job {job} ended: {seen}, not {sorted(states)}; it printed: {self.output(job)[-2000:]}"
                )
            return seen["JobState"] in states

        self.wait(reached, f"job {job} to be {' or '.join(sorted(states))}", timeout)
        return seen

    def processes(self) -> list[Process]:
        """All living processes of the cluster."""
        return processes.find(self.directory)

    def node_processes(self, node: str) -> list[Process]:
        """Those of a node, its daemon included."""
        return [process for process in self.processes() if process.node == node]

    def job_processes(self) -> list[Process]:
        """What jobs started, on all nodes, and still lives."""
        return [process for process in self.processes() if process.is_job]

    # Disturbances and repairs

    def kill_node(self, node: str) -> None:
        """Power loss: everything on the node dies at once. slurmctld is not told."""
        if (init := nodes.find_init(self.directory, node)) is not None:
            processes.signal_process(init, signal.SIGKILL)  # the kernel takes the rest
        processes.kill(self.directory, node)

    def kill_slurmd(self, node: str) -> None:
        """The daemon alone dies; job steps live on. ``start_node`` brings it back."""
        for process in self.node_processes(node):
            if process.name == "slurmd":
                processes.signal_process(process.pid, signal.SIGKILL)
        self.wait(lambda: not self._has_slurmd(node), f"the death of slurmd on {node}")

    def set_down(self, node: str, reason: str = "test") -> None:
        """As an administrator would; jobs on the node are requeued at once. Undone by ``resume``."""
        self.run(["scontrol", "update", f"nodename={node}", "state=down", f"reason={reason}"])

    def resume(self, node: str) -> None:
        """Let a node that was set down or drained serve again."""
        self.run(["scontrol", "update", f"nodename={node}", "state=resume"])

    def start_node(self, node: str, timeout: float = 20.0) -> None:
        """Start a lost node, or its lost slurmd, and wait until it answers."""
        if not self._has_slurmd(node):
            self._start_slurmd(node)
        self.wait(lambda: "*" not in self.node_state(node), f"{node} to answer", timeout)

    def release(self, job: int, timeout: float = 60.0) -> None:
        """End the 120 s for which SLURM holds back a requeued job, unless it runs already, as it may after the loss of a node.

        Only once the old incarnation is gone from the nodes (StartTime is overwritten before), and 2 s later: a restart on the
        same node within the second in which it was killed fails with "Job credential revoked", and the job with it.
        """
        self.wait_state(job, {"PENDING", "RUNNING"}, timeout)
        time.sleep(2.0)
        if self.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=False).returncode:
            self.wait_state(job, {"RUNNING"} | ENDED, timeout)

    def mend(self, timeout: float = 60.0) -> None:
        """Start all that was lost and resume all that was set down, until every node can serve."""
        for node in self.nodes:
            self.start_node(node)

        def serves(node: str) -> bool:
            state = self.node_state(node)
            if broken := any(word in state for word in ("DOWN", "DRAIN", "*")):
                self.run(
                    ["scontrol", "update", f"nodename={node}", "state=resume"], check=False
                )  # may recover meanwhile
            return not broken

        self.wait(lambda: all([serves(node) for node in self.nodes]), "nodes that serve", timeout)

    def reset(self, timeout: float = 60.0) -> None:
        """Cancel all jobs, mend all nodes, and wait until the cluster is idle and nothing of the jobs lives."""
        active = [job["JobId"] for job in self.jobs() if job["JobState"] not in ENDED]
        if active:
            self.run(["scancel", *active], check=False)
        for process in self.job_processes():
            processes.signal_process(process.pid, signal.SIGKILL)
        self.mend(timeout)
        self.wait(lambda: not self.job_processes(), "the end of all processes of jobs", timeout)
        self.wait(self._is_idle, "an idle cluster", timeout)

    def stop(self) -> None:
        """Kill every process of the cluster; its files stay. May be called twice."""
        try:
            processes.kill(self.directory)
        finally:
            if self._keeper is not None:
                self._keeper.kill()
                self._keeper.wait()
                self._keeper = None
            for child in self._children:
                child.wait()
            self._children.clear()

    def _start_daemons(self, isolate: str) -> None:
        self._children.append(nodes.start_munged(self.directory))
        if self.settings.isolated:
            try:
                for node in self.nodes:
                    self._children.append(nodes.start_init(self.directory, node))
            except OSError:
                if isolate == "namespaces":
                    raise
                for node in self.nodes:
                    processes.kill(self.directory, node)
                self.settings = replace(self.settings, isolated=False)
        settings.save(self.settings, self.directory)
        socket = self.directory / "run" / "munge.socket"
        self.wait(socket.exists, "munged", 10.0)
        self._children.append(nodes.start_slurmctld(self.directory))
        for node in self.nodes:
            self._start_slurmd(node)
        self.wait(self._is_idle, "all nodes to be idle", 30.0)

    def _start_slurmd(self, node: str) -> None:
        init = None
        if self.settings.isolated:
            init = nodes.find_init(self.directory, node)
            if init is None:
                self._children.append(nodes.start_init(self.directory, node))
                init = nodes.find_init(self.directory, node)
        self._children.append(nodes.start_slurmd(self.directory, node, init))
        self._children = [child for child in self._children if child.poll() is None]

    def _has_slurmd(self, node: str) -> bool:
        return any(process.name == "slurmd" for process in self.node_processes(node))

    def _is_idle(self) -> bool:
        states = self.run(
            ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"], check=False
        ).stdout.split()
        return states == ["idle"] * len(self.nodes)

    def _situation(self) -> str:
        """Jobs, nodes and the ends of the logs, for a message."""
        parts = [
            self.run(["squeue", "--all"], check=False).stdout,
            self.run(["sinfo", "--Node", "--long"], check=False).stdout,
        ]
        for log in sorted((self.directory / "log").iterdir()):
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            parts.append("\n".join([f"{log.name}:", *tail]))
        return "\n".join(parts)
