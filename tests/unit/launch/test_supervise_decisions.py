"""What follows when ranks have ended: every rule, without processes."""

from __future__ import annotations

import errno
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamem.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExchangeError,
    ExportError,
    LaunchError,
    OutOfMemoryError,
    TierError,
)
from megamem_launch.cluster import Cluster
from megamem_launch.rundir import cancelled_file, write_json
from megamem_launch.slurm.parse import show_jobs
from megamem_launch.supervise.decide import DONE, EXHAUSTED, FATAL, REQUEUE, Ended, Policy, decide
from megamem_launch.supervise.rank import describe
from megamem_launch.supervise.request import request_of
from megamem_launch.supervise.submission import Submission

POLICY = Policy(restarts=3, requeue=True, followed=False)
FINISHED = {"outcome": "finished", "step": 8, "why": ""}
STOPPED = {"outcome": "stopped", "step": 5, "why": "STOP"}
SAVED = {"outcome": "stopped", "step": 5, "why": "the time limit is near"}
TIMED = {"asked": "time_limit", "why": "the time limit is near"}
LOST = {"node2": "SLURM calls it DOWN"}


@pytest.mark.parametrize(
    ("ended", "outcome", "action", "exit_code"),
    [
        ({"exit_code": 0, "report": FINISHED}, "finished", "exit", DONE),
        ({"exit_code": 0, "report": STOPPED}, "stopped", "exit", DONE),
        ({"exit_code": 0, "report": FINISHED, **TIMED}, "finished", "exit", DONE),
        ({"exit_code": 0, "report": SAVED, **TIMED}, "time_limit", "requeue", DONE),
        # What a person wants counts before whatever else the job ends for, and all ranks had saved before it was reported.
        ({"exit_code": 0, "report": STOPPED, **TIMED}, "stopped", "exit", DONE),
        ({"exit_code": 0, "report": STOPPED, "asked": "preempted", "why": "p", "gone": True}, "stopped", "exit", DONE),
        ({"exit_code": 1, "report": STOPPED, "failure": "rank 3"}, "stopped", "exit", DONE),
        ({"exit_code": 1, "report": SAVED, "fruitless": 3, "progress": True, **TIMED}, "time_limit", "requeue", DONE),
        ({"exit_code": None, "hang": "rank 1 is late", **TIMED}, "time_limit", "requeue", DONE),
        ({"exit_code": None, "failure": "rank 3", "lingering": True}, "crash", "requeue", DONE),
        ({"exit_code": 1, **TIMED}, "time_limit", "requeue", DONE),
        ({"exit_code": 1, "fruitless": 3, **TIMED}, "time_limit", "exit", EXHAUSTED),
        (
            {"exit_code": 0, "report": SAVED, "asked": "preempted", "why": "p", "fruitless": 9},
            "preempted",
            "requeue",
            0,
        ),
        (
            {"exit_code": 0, "report": SAVED, "asked": "preempted", "why": "p", "gone": True},
            "preempted",
            "exit",
            REQUEUE,
        ),
        ({"exit_code": None, "asked": "cancelled", "why": "c", "gone": True}, "cancelled", "exit", DONE),
        ({"exit_code": 0, "report": STOPPED, "asked": "stopped", "why": "s"}, "stopped", "exit", DONE),
        ({"exit_code": 1, "asked": "stopped", "why": "s"}, "stopped", "exit", EXHAUSTED),
        ({"exit_code": None, "superseded": True}, "superseded", "exit", DONE),
        ({"exit_code": 1, "fatal": "data.path is empty", "failure": "rank 0"}, "fatal", "exit", FATAL),
        ({"exit_code": None, "unfit": "not shared", "checked": False}, "preflight", "exit", FATAL),
        ({"exit_code": None, "bad_nodes": LOST, "checked": False}, "preflight", "requeue", DONE),
        ({"exit_code": None, "failure": "all-reduce", "checked": False}, "preflight", "restart", DONE),
        ({"exit_code": 1, "failure": "rank 3"}, "crash", "restart", DONE),
        ({"exit_code": 1, "failure": "rank 3", "fruitless": 2}, "crash", "restart", DONE),
        ({"exit_code": 1, "failure": "rank 3", "fruitless": 3}, "crash", "exit", EXHAUSTED),
        ({"exit_code": 1, "failure": "rank 3", "fruitless": 3, "progress": True}, "crash", "restart", DONE),
        ({"exit_code": None, "hang": "rank 1 is late"}, "hang", "restart", DONE),
        ({"exit_code": 1, "failure": "rank 3", "bad_nodes": LOST}, "node_failure", "requeue", DONE),
        ({"exit_code": 1, "bad_nodes": LOST, "gone": True, "asked": "preempted"}, "node_failure", "exit", REQUEUE),
        ({"exit_code": None, "bad_nodes": LOST, "gone": True, "asked": "cancelled"}, "cancelled", "exit", DONE),
        # The report is that of a clean end alone: ranks may fail after rank 0 has written it.
        ({"exit_code": 1, "report": FINISHED, "failure": "rank 3"}, "crash", "restart", DONE),
    ],
)
def test_rules(ended: dict[str, Any], outcome: str, action: str, exit_code: int) -> None:
    decision = decide(Ended(**ended), POLICY)
    assert (decision.outcome, decision.action, decision.exit_code) == (outcome, action, exit_code)
    assert decision.reason or outcome == "cancelled"


def test_a_chain_goes_on_by_its_next_job_and_only_at_the_time_limit() -> None:
    followed = replace(POLICY, followed=True)
    limit = decide(Ended(exit_code=0, report=SAVED, **TIMED), followed)
    assert (limit.action, limit.exit_code) == ("exit", DONE) and "next job" in limit.reason
    preempted = decide(Ended(exit_code=0, report=SAVED, asked="preempted", why="p"), followed)
    assert preempted.action == "requeue"
    last = decide(Ended(exit_code=0, report=SAVED, **TIMED), replace(POLICY, chain=True))
    assert (last.action, last.exit_code) == ("exit", DONE) and "the last of its chain" in last.reason


def test_a_hang_is_named_though_a_stop_was_asked_for() -> None:
    assert "rank 1 is late" in decide(Ended(exit_code=None, hang="rank 1 is late", **TIMED), POLICY).reason


def test_without_requeue_the_exit_code_asks_for_it() -> None:
    kept = replace(POLICY, requeue=False)
    for ended in (Ended(exit_code=0, report=SAVED, **TIMED), Ended(exit_code=1, bad_nodes=LOST)):
        decision = decide(ended, kept)
        assert (decision.action, decision.exit_code) == ("exit", REQUEUE)


def test_an_exhausted_budget_says_how_often_and_what_to_do() -> None:
    reason = decide(Ended(exit_code=1, failure="rank 3 on n: boom", fruitless=3), POLICY).reason
    assert "rank 3 on n: boom" in reason and "4 starts in a row" in reason and "submit it again" in reason


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    return Submission(run_dir=tmp_path, config=tmp_path / "c.yaml", steps=8, stages=1, cluster=Cluster(name="c"))


def job(state: str, *, ends_in: float = 86400.0, preempted: float | None = None):
    text = f"JobId=7 JobName=x\n   JobState={state} Reason=None EndTime={int(time.time() + ends_in)}\n"
    found = show_jobs(text)[0]
    return replace(found, preempted=preempted)


@pytest.mark.parametrize(
    ("number", "known", "asked", "final"),
    [
        (signal.SIGUSR1, job("RUNNING", ends_in=100), "time_limit", False),
        (signal.SIGUSR1, job("RUNNING"), "preempted", False),
        (signal.SIGUSR1, job("RUNNING", ends_in=100, preempted=time.time()), "preempted", False),
        (signal.SIGTERM, job("RUNNING", preempted=time.time()), "preempted", False),
        (signal.SIGTERM, job("CANCELLED"), "cancelled", True),
        (signal.SIGTERM, job("TIMEOUT"), "time_limit", False),
        (signal.SIGTERM, job("PENDING"), "preempted", False),
        (signal.SIGTERM, None, "preempted", False),
    ],
)
def test_signals_of_slurm(number: signal.Signals, known, asked: str, final: bool, submission: Submission) -> None:
    request = request_of(number, known, submission, local=False, again=False)
    assert request is not None and (request.asked, request.final) == (asked, final)


def test_without_an_answer_the_last_known_end_tells(submission: Submission) -> None:
    for ends, asked in ((time.time() + 100, "time_limit"), (time.time() + 9999, "preempted"), (None, "preempted")):
        request = request_of(signal.SIGUSR1, None, submission, local=False, again=False, ends=ends)
        assert request is not None and request.asked == asked


def test_a_second_signal_changes_nothing_unless_it_cancels(submission: Submission) -> None:
    assert request_of(signal.SIGTERM, job("RUNNING"), submission, local=False, again=True) is None
    write_json(cancelled_file(submission.run_dir), {})
    request = request_of(signal.SIGTERM, job("RUNNING"), submission, local=False, again=True)
    assert request is not None and request.asked == "cancelled" and request.final


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (ConfigError("data.path is empty"), True),
        (DataError("no shard"), True),
        (ExportError("no tensor"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Quota exceeded"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (PermissionError(errno.EPERM, "Operation not permitted"), True),
        (caused(CheckpointError("not written"), OSError(errno.ENOSPC, "No space left on device")), True),
        (OutOfMemoryError("rank 0 ran out of memory"), False),
        (CheckpointError("another process is training"), False),
        (caused(CheckpointError("not written"), OSError(errno.ESTALE, "Stale file handle")), False),
        (caused(CheckpointError("not written"), RuntimeError("CUDA error: uncorrectable ECC error")), False),
        (TierError("no room"), False),
        (ExchangeError("another rank stopped"), False),
        (LaunchError("taken over"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (RuntimeError("a bug"), False),
    ],
    ids=lambda value: repr(value),
)
def test_only_what_a_person_must_mend_is_fatal(error: BaseException, fatal: bool) -> None:
    sentence, decided = describe(error)
    assert decided is fatal and sentence


def test_a_second_interrupt_on_this_machine_ends_at_once(submission: Submission) -> None:
    first = request_of(signal.SIGINT, None, submission, local=True, again=False)
    second = request_of(signal.SIGINT, None, submission, local=True, again=True)
    assert first is not None and second is not None
    assert (first.asked, first.final, second.final) == ("stopped", False, True)
