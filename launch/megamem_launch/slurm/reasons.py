"""Why a job waits or ended, in plain words. SLURM says it in one word, of which it knows some two hundred."""

from __future__ import annotations

import datetime
import re

from megamem_launch.slurm.parse import Job

_WAITS = {
    "Resources": "the nodes that it needs are in use",
    "Priority": "jobs of higher priority go first",
    "Dependency": "it starts when the job before it has ended",
    "DependencyNeverSatisfied": "the job that it depends on ended so that it can never start; cancel it",
    "JobArrayTaskLimit": "as many jobs of its sweep run as may at a time",
    "JobHeldUser": "it is held; `megamem launch requeue` lets it go on",
    "JobHeldAdmin": "an administrator of the cluster holds it",
    "JobHoldMaxRequeue": "SLURM requeued it too often and holds it; `megamem launch requeue` lets it go on",
    "MaxRequeueExceeded": "SLURM requeued it too often and holds it; `megamem launch requeue` lets it go on",
    "launch_failed_requeued_held": "it could not be started on its nodes and is held; `megamem launch requeue` lets it go on",
    "PartitionDown": "its partition takes jobs but starts none now",
    "PartitionInactive": "its partition is closed",
    "PartitionNodeLimit": "its partition does not give one job so many nodes; cancel it and set nodes",
    "PartitionTimeLimit": "its partition does not give one job so much time; cancel it and set slurm.time",
    "BadConstraints": "no node of the cluster has what it asks for; cancel it and set slurm.constraint or what a node must have",
    "InvalidAccount": "its account was removed; cancel it and set slurm.account",
    "InvalidQOS": "its QOS was removed; cancel it and set slurm.qos",
    "Licenses": "a licence that it needs is in use",
    "Reservation": "its reservation has not begun",
    "ReservationDeleted": "its reservation was deleted; cancel it and set slurm.reservation",
    "NodeDown": "a node that it needs is down",
    "Prolog": "its nodes are being prepared",
    "Cleaning": "its former nodes are being cleaned",
    "FrontEndDown": "the front end of the cluster is down",
}

_LIMITS = {"Assoc": "its account", "QOS": "its QOS"}

_ENDS = {
    "BOOT_FAIL": "a node did not boot",
    "CANCELLED": "it was cancelled",
    "DEADLINE": "its deadline passed",
    "NODE_FAIL": "a node failed and SLURM did not requeue it",
    "OUT_OF_MEMORY": "it needed more host memory than it had; set slurm.memory",
    "PREEMPTED": "another job took its nodes and SLURM did not requeue it",
    "TIMEOUT": "its time was over before it had saved; set slurm.signal_seconds",
}


def why_waiting(job: Job) -> str:
    """Why a waiting job waits, in a sentence without its end."""
    reason = job.reason.replace(" ", "_")
    if reason == "BeginTime":
        when = f"it may start at {clock(job.eligible)}" if job.eligible else "it may not start yet"
        return f"{when}, as SLURM holds every requeued job for some minutes" if job.restarts else when
    if reason == "Dependency" and job.dependency:
        before = ", ".join(dict.fromkeys(re.findall(r":(\d[\d_]*)", job.dependency)))
        return f"it starts when job {before} has ended" if before else _WAITS["Dependency"]
    if reason in _WAITS:
        expected = (
            f"; SLURM expects {clock(job.started)}" if job.started and reason in ("Resources", "Priority") else ""
        )
        return _WAITS[reason] + expected
    if reason.startswith("ReqNodeNotAvail"):
        nodes = re.search(r"UnavailableNodes:(\S+)", reason)
        if "maintenance" in reason.lower():
            return "nodes that it needs are reserved for maintenance, before which its time limit does not end"
        return f"nodes that it needs are down or drained{f': {nodes[1]}' if nodes else ''}"
    if reason.startswith("Nodes_required_for_job"):
        return "nodes that it needs are down, drained or kept for jobs of higher priority"
    for prefix, owner in _LIMITS.items():
        if reason.startswith(prefix):
            return f"a limit of {owner} is reached ({reason})"
    return f"SLURM gives the reason {reason}" if reason else "it has not been looked at by the scheduler yet"


def why_ended(job: Job) -> str:
    """How a job ended for which no better account exists, in a sentence without its end."""
    if job.state in _ENDS:
        return _ENDS[job.state]
    status, _, signal = job.exit_code.partition(":")
    if not_opened(job):
        return "the node could not open RUN/launch/logs; set runs_dir to a path that all nodes share"
    if signal not in ("", "0"):
        return f"its script was ended by signal {signal}"
    return f"its script ended with exit code {status}" if status else f"SLURM calls it {job.state}"


def not_opened(job: Job) -> bool:
    """Whether a job failed since its node could not make the file of its output."""
    return job.state == "FAILED" and job.exit_code == "0:53"


def clock(time: float) -> str:
    """A time of today as ``14:05``, of another day as ``2026-03-01 14:05``, in local time."""
    moment = datetime.datetime.fromtimestamp(time)
    return moment.strftime("%H:%M" if moment.date() == datetime.datetime.now().date() else "%Y-%m-%d %H:%M")
