"""What SLURM's commands print, as records. Pure functions; forms of 22.05 to 24.11 are covered by recorded answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_EMPTY = frozenset({"", "(null)", "None", "N/A", "NONE", "n/a", "Unknown", "none"})
"""How the commands write nothing."""

_OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
    | {"PREEMPTED", "REVOKED", "TIMEOUT"}
)
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RECONFIG_FAIL"})

_DEAD = frozenset({"DOWN", "NOT_RESPONDING", "FAIL", "FAILING", "ERROR", "UNKNOWN", "REBOOT_ISSUED"})
_CLOSED = frozenset({"DRAIN", "DRAINED", "DRAINING", "MAINT", "MAINTENANCE", "RESERVED", "REBOOT_REQUESTED", "FUTURE"})

_FREE_TEXT = re.compile(r"\b(JobName|Comment|AdminComment|SystemComment|Command|WorkDir|StdErr|StdIn|StdOut|OS|Extra)=")
"""Values that may hold anything, spaces and ``=`` included; each ends its line in the answer for people."""

_KEY = re.compile(r"(?:^|\s)([A-Z][\w:/.]*)=")

SQUEUE_FIELDS = (
    *("JobID", "ArrayJobID", "ArrayTaskID", "State", "Reason", "Partition", "NumNodes", "NodeList", "RestartCnt"),
    *("SubmitTime", "EligibleTime", "StartTime", "EndTime", "PreemptTime", "BatchHost", "Dependency", "Name"),
)
"""Fields of ``squeue --Format`` that :func:`squeue_jobs` reads, the one that may hold anything last."""

SACCT_FIELDS = ("JobID", "State", "Start", "End", "ElapsedRaw", "MaxRSS", "ExitCode", "NodeList")
"""Fields of ``sacct --format`` that :func:`sacct_records` reads."""


@dataclass(frozen=True)
class Job:
    """One job, or one task of a job array, as the controller knows it now. Times are seconds since the epoch."""

    number: str
    """The job's own number; SLURM_JOB_ID inside it."""
    array: str
    """Number of the job array that it is a task of; empty without one."""
    task: str
    """SLURM_ARRAY_TASK_ID; ``1-5%2`` for those of an array that have not started yet; empty without one."""
    name: str
    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED, TIMEOUT, NODE_FAIL, PREEMPTED, ..."""
    reason: str
    """Why it waits or ended, in SLURM's word (Resources, BeginTime, ...); empty for none."""
    partition: str
    node_count: int
    nodes: str
    """The nodes that it has, as SLURM writes lists (``node[1-4]``); empty while it waits."""
    batch_host: str
    restarts: int
    """How often the job was requeued; SLURM_RESTART_COUNT of its next or present start."""
    submitted: float | None
    eligible: float | None
    started: float | None
    """Its start, or the one that the scheduler expects while the job waits."""
    ends: float | None
    """Its end, or the one that its time limit sets."""
    preempted: float | None
    """When it was or will be preempted."""
    dependency: str
    excluded: str | None = None
    """The nodes that it must not get, as a list; None where squeue was asked, which does not tell."""
    exit_code: str = ""
    """``status:signal`` of the batch script; empty where squeue was asked."""

    @property
    def id(self) -> str:
        """As people write it: ``17``, or ``17_3`` for a task of an array."""
        return f"{self.array}_{self.task}" if self.array else self.number

    @property
    def waiting(self) -> bool:
        """Not started, or requeued."""
        return self.state in _WAITING

    @property
    def over(self) -> bool:
        """Ended for good: no process of it is left and it will not start again by itself."""
        return self.state in _OVER


@dataclass(frozen=True)
class Node:
    """A node as the controller knows it now."""

    name: str
    state: frozenset[str]
    """The state in words: a base (IDLE, MIXED, ALLOCATED, DOWN, ...) and flags (DRAIN, NOT_RESPONDING, MAINTENANCE, ...)."""
    reason: str
    """Why it is down or drained; empty for none."""
    address: str
    """Where it is reached: a name or an address."""

    @property
    def healthy(self) -> bool:
        """Up and answering; a node that drains still serves the job that it has."""
        return not self.state & (_DEAD | {"POWERED_DOWN"})

    @property
    def available(self) -> bool:
        """Open to new jobs, for which the cluster may have to power it up."""
        return not self.state & (_DEAD | _CLOSED)


def show_jobs(text: str) -> list[Job]:
    """The answer of ``scontrol show job``, in its form of several lines: the one in which a name cannot pass for a state."""
    return [_job(fields) for fields in _records(text, "JobId")]


def show_nodes(text: str) -> list[Node]:
    """The answer of ``scontrol show node``."""
    return [
        Node(
            name=fields["NodeName"],
            state=node_state(fields.get("State", "")),
            reason=_text(fields.get("Reason", "")),
            address=_text(fields.get("NodeAddr", "")) or fields["NodeName"],
        )
        for fields in _records(text, "NodeName")
    ]


_NODE_MARKS = {
    "*": "NOT_RESPONDING",
    "~": "POWERED_DOWN",
    "#": "POWERING_UP",
    "%": "POWERING_DOWN",
    "@": "REBOOT_REQUESTED",
    "^": "REBOOT_ISSUED",
    "$": "MAINTENANCE",
}


def node_state(word: str) -> frozenset[str]:
    """``IDLE+DRAIN``, ``down*`` and the like as a set of upper-case words."""
    words = set(re.findall(r"[A-Z_]+", word.upper()))
    return frozenset(words | {name for mark, name in _NODE_MARKS.items() if mark in word})


def squeue_jobs(text: str) -> list[Job]:
    """The answer of ``squeue --noheader --array --states=all`` with every one of :data:`SQUEUE_FIELDS` ended by ``|``."""
    jobs = []
    for line in text.splitlines():
        values = line.split("|", len(SQUEUE_FIELDS) - 1)
        if len(values) < len(SQUEUE_FIELDS):
            continue
        fields = dict(zip(SQUEUE_FIELDS, values, strict=True))
        is_task = bool(_text(fields["ArrayTaskID"]))
        jobs.append(
            _job(
                fields
                | {
                    "JobId": fields["JobID"],
                    "ArrayJobId": fields["ArrayJobID"] if is_task else "",
                    "ArrayTaskId": fields["ArrayTaskID"],
                    "JobName": fields["Name"].removesuffix("|"),
                    "JobState": fields["State"],
                    "Restarts": fields["RestartCnt"],
                }
            )
        )
    return jobs


def sacct_records(text: str) -> list[dict[str, str]]:
    """The answer of ``sacct --noheader --parsable2`` with :data:`SACCT_FIELDS`, one mapping per incarnation of a job or step.

    ``CANCELLED by 1000`` is shortened to its first word.
    """
    records = []
    for line in text.splitlines():
        values = line.split("|")
        if len(values) == len(SACCT_FIELDS):
            record = dict(zip(SACCT_FIELDS, values, strict=True))
            records.append(record | {"State": record["State"].split()[0] if record["State"] else ""})
    return records


def mebibytes(size: str) -> float | None:
    """``123456K``, ``1.5G`` and the like, as sacct writes MaxRSS, in MiB; None for none."""
    match = re.fullmatch(r"([\d.]+)([KMGTP]?)", size)
    if match is None:
        return None
    return float(match[1]) * {"": 2.0**-20, "K": 2.0**-10, "M": 1.0, "G": 2.0**10, "T": 2.0**20, "P": 2.0**30}[match[2]]


def _records(text: str, first: str) -> Iterator[dict[str, str]]:
    """Records of ``scontrol show``, each of which begins with the key ``first`` at the start of a line."""
    for block in re.split(rf"(?m)^(?={first}=)", text):
        fields: dict[str, str] = {}
        for line in block.splitlines():
            free = _FREE_TEXT.search(line)
            marks = list(_KEY.finditer(line, 0, free.start() if free else len(line)))
            ends = [mark.start() for mark in marks[1:]] + [free.start() if free else len(line)]
            for mark, end in zip(marks, ends):  # noqa: B905 - a line without a key has an end alone
                fields.setdefault(mark[1], line[mark.end() : end].strip())
            if free:
                fields.setdefault(free[1], line[free.end() :].strip())
        if first in fields:
            yield fields


def _job(fields: dict[str, str]) -> Job:
    excluded = fields.get("ExcNodeList")
    return Job(
        number=fields["JobId"],
        array=_text(fields.get("ArrayJobId", "")),
        task=_text(fields.get("ArrayTaskId", "")),
        name=fields.get("JobName", ""),
        state=re.split(r"[,+\s]", fields.get("JobState", ""))[0],
        reason=_text(fields.get("Reason", "")),
        partition=_text(fields.get("Partition", "")),
        node_count=int(re.sub(r"\D.*", "", fields.get("NumNodes", "")) or 0),
        nodes=_text(fields.get("NodeList", "")),
        batch_host=_text(fields.get("BatchHost", "")),
        restarts=int(fields.get("Restarts") or 0),
        submitted=_time(fields.get("SubmitTime", "")),
        eligible=_time(fields.get("EligibleTime", "")),
        started=_time(fields.get("StartTime", "")),
        ends=_time(fields.get("EndTime", "")),
        preempted=_time(fields.get("PreemptTime", "")),
        dependency=_text(fields.get("Dependency", "")),
        excluded=None if excluded is None else _text(excluded),
        exit_code=fields.get("ExitCode", ""),
    )


def _text(value: str) -> str:
    return "" if value.strip() in _EMPTY else value.strip()


def _time(value: str) -> float | None:
    return float(value) if value.isdigit() and int(value) > 0 else None
