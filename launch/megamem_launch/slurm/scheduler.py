"""SLURM as its launcher and its supervisor use it: a handful of questions and orders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from megamem_launch.slurm import parse
from megamem_launch.slurm.client import SchedulerRefusal, run
from megamem_launch.slurm.parse import Job, Node

_UNKNOWN_JOB = "invalid job id"


class Slurm:
    """The cluster that SLURM's commands on this machine speak to.

    Every method asks anew: nothing is remembered, so no answer is stale. All raise SchedulerUnavailable while the controller
    does not answer, SchedulerRefusal (which keeps SLURM's complaint) when it says no, and LaunchError without SLURM.
    """

    def job(self, job_id: str, timeout: float = 60.0) -> Job | None:
        """A job (``17``, or ``17_3`` for a task of an array); None once the controller has forgotten it."""
        try:
            found = parse.show_jobs(run("scontrol", "show", "job", job_id, timeout=timeout))
        except SchedulerRefusal as refusal:
            if _UNKNOWN_JOB in refusal.complaint.lower():
                return None
            raise
        return found[0] if found else None

    def jobs(self, job_ids: Sequence[str]) -> list[Job]:
        """Those of some jobs that the controller still knows, ended ones included; all tasks of an array, each by itself."""
        if not job_ids:
            return []
        fields = ",".join(f"{field}:|" for field in parse.SQUEUE_FIELDS)
        selection = ("squeue", "--noheader", "--array", "--all", "--states=all", f"--Format={fields}")
        try:
            return parse.squeue_jobs(run(*selection, f"--jobs={','.join(job_ids)}"))
        except SchedulerRefusal as refusal:  # the only one of them is forgotten; of several, squeue leaves those out
            if _UNKNOWN_JOB in refusal.complaint.lower():
                return []
            raise

    def nodes(self, names: Sequence[str]) -> dict[str, Node]:
        """Nodes by name; those that the cluster does not have are left out."""
        if not names:
            return {}
        try:
            found = parse.show_nodes(run("scontrol", "show", "node", ",".join(names)))
        except SchedulerRefusal as refusal:
            if "not found" not in refusal.complaint:
                raise
            if len(names) == 1:
                return {}
            return {name: node for one in names for name, node in self.nodes([one]).items()}
        return {node.name: node for node in found}

    def node(self, name: str) -> Node | None:
        """A node; None where the cluster has none of that name."""
        return self.nodes([name]).get(name)

    def hostnames(self, nodes: str) -> list[str]:
        """The names in a list as SLURM writes it: ``node[1-3]`` is node1, node2, node3."""
        return run("scontrol", "show", "hostnames", nodes).split() if nodes else []

    def available_nodes(self, partition: str = "") -> list[str]:
        """Names of the nodes, of a partition or of the whole cluster, that are up and open to jobs, busy ones included."""
        which = [f"--partition={partition}"] if partition else []
        lines = (
            line.split("|") for line in run("sinfo", "--noheader", "--Node", "--format=%N|%T", *which).splitlines()
        )
        states = {line[0]: parse.node_state(line[1]) for line in lines if len(line) == 2}
        return [name for name, state in states.items() if Node(name, state, "", name).available]

    def requeue(self, job_id: str) -> None:
        """Stop a job at once and let it wait for its next start. SLURM holds it for about two minutes (reason BeginTime).

        SLURM also revives a job that ended or was cancelled while it remembers it, so ask :meth:`job` first.
        """
        run("scontrol", "requeue", job_id)

    def release(self, job_id: str) -> None:
        """Let a held job wait for its nodes like any other."""
        run("scontrol", "release", job_id)

    def update(self, job_id: str, **fields: str) -> None:
        """Change a job's fields by scontrol's names, such as ``ExcNodeList="node3"`` (while PENDING) or ``StartTime="now"``."""
        run("scontrol", "update", f"JobId={job_id}", *(f"{name}={value}" for name, value in fields.items()))

    def cancel(self, job_ids: Iterable[str]) -> None:
        """End jobs for good. Those that have ended already, or that SLURM has forgotten, are no error."""
        found = list(job_ids)
        if found:
            run("scancel", "--quiet", *found)

    def signal(self, target: str, signal: str, *, batch: bool = False) -> None:
        """Send a signal (``USR1``) to all steps of a job, or to one (``17.0``); with ``batch`` to the batch script alone."""
        run("scancel", *(["--batch"] if batch else []), f"--signal={re.sub('^SIG', '', signal)}", target)
