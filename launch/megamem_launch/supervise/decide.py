"""What follows when the ranks have ended: a function of what is known, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megamem_launch.rundir import STOP

DONE, EXHAUSTED, FATAL, REQUEUE = 0, 1, 2, 75
"""Exit codes of the supervisor: done, or ended by a person; retry budget used up; a person must mend something; to be requeued
(EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How the ranks of one incarnation ended."""

    exit_code: int | None
    """Of the step; None where the supervisor killed it or never started it."""
    report: Mapping[str, Any] | None = None
    """``outcome.json``, where rank 0 came to a clean end."""
    asked: Literal["", "time_limit", "preempted", "cancelled", "stopped"] = ""
    """Why the supervisor had asked the ranks to stop."""
    why: str = ""
    """The same in words."""
    superseded: bool = False
    """Another incarnation holds the lease."""
    gone: bool = False
    """SLURM has requeued the job by itself: nothing may be started in it any more."""
    unfit: str = ""
    """What the checks before the start found that no other node would cure."""
    fatal: str = ""
    """The error of a rank that no restart cures."""
    hang: str = ""
    """The watchdog's verdict."""
    late_nodes: tuple[str, ...] = ()
    """Those of the ranks that were late in it."""
    failure: str = ""
    """What is known of the first rank that failed."""
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    """Nodes that cannot be used, and why."""
    checked: bool = True
    """Whether the ranks were started; False where the checks before the start ended it."""
    lingering: bool = False
    """Processes of the ranks could not be killed: nothing may be started beside them."""
    progress: bool = False
    """Whether there is a newer checkpoint than at the start."""
    fruitless: int = 0
    """Starts in a row before this one that ended without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the cluster description and the submission allow."""

    restarts: int
    """Starts without progress after the first."""
    requeue: bool
    """Whether the job may be put back into the queue."""
    followed: bool
    """A later job of a chain begins when this one ends."""
    chain: bool = False
    """The job is one of a chain, whose number of jobs bounds its time."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to record and to do."""

    outcome: str
    reason: str
    action: Literal["exit", "requeue", "restart"]
    exit_code: int = DONE


def decide(ended: Ended, policy: Policy) -> Decision:
    """The first rule that fits: a person's wish, the end of training, what must be mended, what a new start may cure."""
    if ended.asked == "cancelled":
        return Decision("cancelled", ended.why, "exit")
    if ended.superseded:
        return Decision("superseded", "another incarnation has taken the run over", "exit")
    report = ended.report
    if report is not None and report["outcome"] == "finished":
        if ended.exit_code == 0:
            return Decision("finished", f"trained all {report['step']} steps", "exit")
        report = None  # other ranks may fail after the first one has written it; all have saved where it says stopped
    if report is not None and (not ended.asked or report.get("why") == STOP):
        return Decision("stopped", f"stopped after step {report['step']}: {report.get('why', '')}", "exit")
    if ended.gone and ended.bad_nodes:
        return Decision("node_failure", _reason(ended), "exit", REQUEUE)
    if ended.unfit:
        return Decision("preflight", ended.unfit, "exit", FATAL)
    if ended.asked:
        saved = "the ranks ended without saving"
        if report is not None:
            saved = f"saved at step {report['step']}"
        elif ended.hang or ended.failure:
            saved += f" ({_reason(ended)})"
        elif not ended.checked:
            saved = "the ranks had not begun"
        elif ended.exit_code is None:
            saved = "the ranks save if SLURM leaves them the time"
        return _after_request(ended, policy, f"{ended.why}; {saved}", saved=report is not None)
    if ended.gone:
        return Decision("preempted", _reason(ended) or "SLURM took the job from its nodes", "exit", REQUEUE)
    if ended.fatal:
        return Decision("fatal", ended.fatal, "exit", FATAL)
    return _after_failure(ended, policy)


def _after_request(ended: Ended, policy: Policy, reason: str, *, saved: bool) -> Decision:
    if ended.asked == "stopped":
        return Decision("stopped", reason, "exit", DONE if saved else EXHAUSTED)
    if ended.asked == "time_limit" and (policy.chain or policy.followed):
        then = (
            "the next job of the chain goes on" if policy.followed else "it was the last of its chain; submit it again"
        )
        return Decision("time_limit", f"{reason}; {then}", "exit")
    if ended.asked == "time_limit" and _exhausted(ended, policy):
        return Decision("time_limit", _no_more(ended, reason), "exit", EXHAUSTED)
    if ended.gone or not policy.requeue:
        return Decision(ended.asked, reason, "exit", REQUEUE)
    return Decision(ended.asked, reason, "requeue")


def _after_failure(ended: Ended, policy: Policy) -> Decision:
    outcome = "hang" if ended.hang else "node_failure" if ended.bad_nodes else "crash"
    if not ended.checked:
        outcome = "preflight"
    reason = _reason(ended) or f"the ranks ended with exit code {ended.exit_code} without saying why"
    if _exhausted(ended, policy):
        return Decision(outcome, _no_more(ended, reason), "exit", EXHAUSTED)
    if ended.lingering and policy.requeue:
        reason += "; some of its processes could not be killed, so the job leaves its nodes"
    elif not ended.bad_nodes:
        return Decision(outcome, reason, "restart")
    if not policy.requeue:
        return Decision(outcome, reason, "exit", REQUEUE)
    return Decision(outcome, reason, "requeue")


def _reason(ended: Ended) -> str:
    nodes = [f"{node}: {why}" for node, why in ended.bad_nodes.items()]
    return "; ".join([text for text in (ended.hang, ended.failure, *nodes) if text])


def _failures(ended: Ended) -> int:
    return 0 if ended.progress else ended.fruitless + 1


def _exhausted(ended: Ended, policy: Policy) -> bool:
    return _failures(ended) > policy.restarts


def _no_more(ended: Ended, reason: str) -> str:
    return (
        f"{reason}; {_failures(ended)} starts in a row brought no newer checkpoint, so the run is not started again: mend the "
        "cause and submit it again"
    )
