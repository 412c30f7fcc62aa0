"""The machines that an incarnation runs on, and those that SLURM gave to a job."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megamem.errors import LaunchError
from megamem.observe.heartbeat import node_name
from megamem_launch import rundir
from megamem_launch.cluster import Cluster
from megamem_launch.slurm.client import SchedulerUnavailable
from megamem_launch.slurm.container import container_prefix, container_srun_options, rank_python
from megamem_launch.slurm.parse import Job
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.supervise import rendezvous
from megamem_launch.supervise.exclusion import excluded, fit
from megamem_launch.supervise.findings import Findings, read_findings
from megamem_launch.supervise.incarnation import Incarnation
from megamem_launch.supervise.preflight import Arguments, as_argument
from megamem_launch.supervise.signals import unblock
from megamem_launch.supervise.steps import SrunStep, Step, wait

_CHECK_SECONDS = 300.0  # a cold network file system takes minutes to import torch from
_REACH_SECONDS = 30.0
_ANSWER_SECONDS, _SOON_SECONDS = 60.0, 5.0
_AT_ONCE = 32


class Allocation(Protocol):
    """Where ranks are started."""

    first: Incarnation
    """The incarnation of the first attempt here."""
    nodes: list[str]
    ends: float
    """When its time is over, in seconds since the epoch, as far as is known."""

    def start(self, run_dir: Path, config: Path, incarnation: Incarnation) -> Step:
        """Start all ranks of an incarnation."""
        ...

    def examine(self, run_dir: Path, incarnation: Incarnation, interrupted: Callable[[], bool]) -> Findings:
        """Check the nodes before a start."""
        ...

    def lost_nodes(self, *, probe: bool) -> dict[str, str]:
        """Nodes that died, and why; with ``probe`` also those that are being taken away, and those on which no process starts."""
        ...

    def job(self, *, patient: bool = True) -> Job | None:
        """The job, as SLURM knows it now; None where there is none, or SLURM does not answer: in some minutes, or in seconds."""
        ...

    def runs(self, job: str) -> bool | None:
        """Whether another job still runs; None where nobody knows."""
        ...


def environment_of(incarnation: Incarnation) -> dict[str, str]:
    """The environment of the ranks."""
    return {**os.environ, rundir.INCARNATION: str(incarnation), "PYTHONUNBUFFERED": "1"}


@dataclass(slots=True)
class SlurmAllocation:
    """The nodes of the job that this process is the batch step of."""

    cluster: Cluster
    first: Incarnation
    nodes: list[str]
    slurm: Slurm
    job_id: str
    """As SLURM's commands want it: a task of an array by the array's number and its own."""
    ends: float = float("inf")

    @classmethod
    def here(cls, cluster: Cluster) -> SlurmAllocation:
        """From the variables of the batch step; LaunchError outside of one."""
        try:
            number, nodelist = os.environ["SLURM_JOB_ID"], os.environ["SLURM_JOB_NODELIST"]
        except KeyError as error:
            raise LaunchError(
                f"{error.args[0]} is not set, so this is no job of SLURM; use `megamem launch slurm`, or `megamem launch local`"
            ) from None
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        slurm = Slurm()
        here = cls(
            cluster=cluster,
            first=Incarnation(number, int(os.environ.get("SLURM_RESTART_COUNT", "0")), 0),
            nodes=slurm.hostnames(nodelist),
            slurm=slurm,
            job_id=f"{array}_{task}" if array else number,
        )
        here.job()
        return here

    def start(self, run_dir: Path, config: Path, incarnation: Incarnation) -> Step:
        arguments = [str(run_dir), str(config), self._endpoint(incarnation)]
        ranks = self.cluster.ranks_per_node
        if self.cluster.slurm.mode == "srun":
            tasks, module, arguments = ranks, "rank", [*arguments, str(ranks)]
        else:
            tasks, module, arguments = 1, "agent", [*arguments, str(len(self.nodes)), str(ranks)]
        name = str(incarnation)
        command = [*self._srun(name, tasks), *self._python(f"megamem_launch.supervise.{module}"), *arguments]
        return SrunStep(self.first.job, name, command, environment_of(incarnation))

    def examine(self, run_dir: Path, incarnation: Incarnation, interrupted: Callable[[], bool]) -> Findings:
        live = rundir.live_dir(run_dir, str(incarnation))
        token_file = live / "token"
        arguments = Arguments(
            run_dir=str(run_dir),
            token_file=str(token_file),
            token=secrets.token_hex(),
            gpus=self.cluster.gpus_per_node,
            nodes=len(self.nodes),
            endpoint=self._endpoint(incarnation),
        )
        token_file.write_text(arguments.token, encoding="utf-8")
        command = [
            *self._srun("preflight", 1),
            *self._python("megamem_launch.supervise.preflight"),
            as_argument(arguments),
        ]
        output, complaint = live / "preflight.out", live / "preflight.err"
        with output.open("wb") as out, complaint.open("wb") as err:
            process = subprocess.Popen(
                command,
                env=environment_of(incarnation),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                preexec_fn=unblock,
            )
            if not wait(process, _CHECK_SECONDS, interrupted):
                process.terminate()
                if not wait(process, _REACH_SECONDS):
                    process.kill()
                    process.wait()
        lost = self.lost_nodes(probe=True) if process.returncode and not interrupted() else {}
        if lost:
            return Findings(lost)
        found = read_findings(
            output.read_text(encoding="utf-8", errors="replace"),
            self.nodes,
            host=node_name(),
            run_dir=run_dir,
            complaint=complaint.read_text(encoding="utf-8", errors="replace"),
        )
        rundir.write_json(rundir.preflight_file(run_dir, str(incarnation)), found.measured)
        return found

    def lost_nodes(self, *, probe: bool) -> dict[str, str]:
        lost = {}
        draining = {"DRAIN", "DRAINING", "DRAINED"} if probe else set()
        with contextlib.suppress(LaunchError):
            known = self.slurm.nodes(self.nodes)
            for name in self.nodes:
                node = known.get(name)
                if node is None or not node.healthy or node.state & draining:
                    words = "+".join(sorted(node.state)) if node else "not in the cluster any more"
                    lost[name] = f"SLURM calls it {words}" + (f" ({node.reason})" if node and node.reason else "")
        return lost or (self._unreachable() if probe else {})

    def job(self, *, patient: bool = True) -> Job | None:
        for _ in range(3 if patient else 1):
            with contextlib.suppress(SchedulerUnavailable):
                found = self.slurm.job(self.job_id, _ANSWER_SECONDS if patient else _SOON_SECONDS)
                return found and self._told_apart(found)
            time.sleep(1.0 if patient else 0.0)
        return None

    def _told_apart(self, job: Job) -> Job:
        """SLURM calls a job COMPLETING, whatever ended it, until its processes are gone; here it gets the state that follows."""
        if job.state == "RUNNING":
            self.ends = job.ends or self.ends
        if job.state != "COMPLETING":
            return job
        if job.restarts > self.first.restart:
            return replace(job, state="REQUEUED")
        if job.preempted is not None:
            return replace(job, state="PREEMPTED")
        if self.lost_nodes(probe=False):
            return replace(job, state="NODE_FAIL")
        return replace(job, state="TIMEOUT" if time.time() >= self.ends else "CANCELLED")

    def runs(self, job: str) -> bool | None:
        with contextlib.suppress(SchedulerUnavailable):
            found = self.slurm.job(job)
            return found is not None and not found.over and not found.waiting
        return None

    def avoid_bad_nodes(self, run_dir: Path) -> str:
        """Keep the next start of the job, which was requeued, off the nodes that the run avoids. Returns in words which of these
        had to be forgotten, since too few others are left; LaunchError where SLURM does not take it."""
        never = set(self.slurm.hostnames(self.cluster.slurm.exclude))
        usable = set(self.slurm.available_nodes(os.environ.get("SLURM_JOB_PARTITION", ""))) - never
        forgotten = fit(run_dir, usable, len(self.nodes))
        avoided = {*excluded(run_dir), *never}
        if avoided or forgotten:
            for patience in range(20, -1, -1):  # SLURM takes it once the job is pending
                try:
                    self.slurm.update(self.job_id, ExcNodeList=",".join(sorted(avoided)))
                    break
                except LaunchError:
                    if not patience:
                        raise
                    time.sleep(0.25)
        if not forgotten:
            return ""
        return (
            f"too few nodes are left without {', '.join(forgotten)}: {len(usable)} are up and {len(self.nodes)} are needed, so "
            "the run may use them again"
        )

    def _srun(self, name: str, tasks_per_node: int) -> list[str]:
        nodes = len(self.nodes)
        options = [
            f"--nodes={nodes}",
            f"--ntasks={nodes * tasks_per_node}",  # alone, --ntasks-per-node is ignored where the job has more tasks
            f"--ntasks-per-node={tasks_per_node}",
            f"--cpus-per-task={self.cluster.cpus_per_node // tasks_per_node}",  # not inherited since 22.05
            "--distribution=block",
            "--overlap",  # a step on a node that is lost holds its share until SLURM has confirmed the loss
            "--kill-on-bad-exit=1",
            "--mpi=none",
            "--unbuffered",
            f"--job-name={name}",
        ]
        return ["srun", *options, *container_srun_options(self.cluster), *container_prefix(self.cluster)]

    def _python(self, module: str) -> list[str]:
        return [rank_python(self.cluster, sys.executable), "-u", "-m", module]

    def _endpoint(self, incarnation: Incarnation) -> str:
        address = rendezvous.address_of(self.nodes[0], self._node_address)
        return f"{address}:{rendezvous.free_port(incarnation)}"

    def _node_address(self, name: str) -> str:
        node = self.slurm.node(name)
        return node.address if node else ""

    def _unreachable(self) -> dict[str, str]:
        """Nodes that no process can be started on: all at once are asked first, each by itself only where that fails."""
        probe = ["srun", "--overlap", "--mpi=none", "--cpus-per-task=1", "--job-name=probe", "--quiet"]
        if not self._answers([*probe, f"--nodes={len(self.nodes)}", f"--ntasks={len(self.nodes)}"], [""]):
            return {}
        silent = []
        for begin in range(0, len(self.nodes), _AT_ONCE):
            silent += self._answers([*probe, "--nodes=1", "--ntasks=1"], self.nodes[begin : begin + _AT_ONCE])
        return {name: f"no process could be started on it within {_REACH_SECONDS:.0f} s" for name in silent}

    def _answers(self, command: list[str], nodes: Sequence[str]) -> list[str]:
        """Those of ``nodes`` on which ``command`` fails."""
        started = {
            node: subprocess.Popen(
                [*command, *([f"--nodelist={node}"] if node else []), "true"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=unblock,
            )
            for node in nodes
        }
        deadline = time.monotonic() + _REACH_SECONDS
        failed = []
        for node, process in started.items():
            if not wait(process, max(0.0, deadline - time.monotonic())) or process.returncode:
                failed.append(node)
                process.kill()
                process.wait()
        return failed
