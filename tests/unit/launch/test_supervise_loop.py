"""The supervisor's loop, with ranks and a SLURM that are made up: notices, marks for later jobs, what goes back to the queue."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megamem_launch import rundir
from megamem_launch.cluster import Cluster, SlurmConfig
from megamem_launch.slurm.parse import Job, show_jobs
from megamem_launch.supervise.allocation import SlurmAllocation
from megamem_launch.supervise.decide import DONE, FATAL, REQUEUE
from megamem_launch.supervise.incarnation import Incarnation, last_late_nodes
from megamem_launch.supervise.signals import Signals
from megamem_launch.supervise.submission import Submission
from megamem_launch.supervise.supervisor import Supervisor
from megamem_launch.supervise.tail import STDERR, put
from megamem_launch.watch.beats import Beat


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A supervisor blocks signals for as long as its process lives."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass
class FakeSlurm:
    job_now: Job
    requeued: list[str] = field(default_factory=list)

    def requeue(self, job_id: str) -> None:
        self.requeued.append(job_id)

    def hostnames(self, nodes: str) -> list[str]:
        return []

    def available_nodes(self, partition: str = "") -> list[str]:
        return ["node1", "node2"]


@dataclass
class FakeStep:
    """Ranks that do ``deeds`` one after another, each when they are looked at, and end with ``code``."""

    deeds: list[Callable[[], None]]
    code: int

    def poll(self) -> int | None:
        if not self.deeds:
            return self.code
        self.deeds.pop(0)()
        return None

    def ask_for_stacks(self) -> None:
        pass

    def states(self, beats: Sequence[Beat]) -> dict[int, str]:
        return {}

    def kill(self) -> bool:
        return True


class FakeAllocation(SlurmAllocation):
    deeds: list[Callable[[], None]]
    code: int
    starts: int

    def start(self, run_dir: Path, config: Path, incarnation: Incarnation) -> FakeStep:
        self.starts += 1
        return FakeStep(self.deeds, self.code)

    def job(self, *, patient: bool = True) -> Job | None:
        return self.slurm.job_now  # type: ignore[attr-defined]

    def runs(self, job: str) -> bool | None:
        return False

    def lost_nodes(self, *, probe: bool) -> dict[str, str]:
        return {}


def supervisor(
    run_dir: Path, job_id: str = "7", *, deeds: list[Callable[[], None]] | None = None, code: int = 0, kind: str = "run"
) -> tuple[Supervisor, FakeAllocation, FakeSlurm]:
    cluster = Cluster(nodes=2, slurm=SlurmConfig(preflight=False))
    known = show_jobs(f"JobId={job_id} JobName=x\n   JobState=RUNNING Reason=None EndTime={int(time.time() + 100)}\n")[
        0
    ]
    slurm = FakeSlurm(known)
    allocation = FakeAllocation(cluster, Incarnation(job_id, 0, 0), ["node1", "node2"], slurm, job_id)  # type: ignore[arg-type]
    allocation.deeds, allocation.code, allocation.starts = deeds or [], code, 0
    submission = Submission(run_dir=run_dir, config=run_dir / "c", steps=8, stages=1, cluster=cluster, kind=kind)
    return Supervisor(submission, allocation), allocation, slurm


def ends(run_dir: Path) -> list[dict[str, Any]]:
    return [r for r in rundir.read_lines(rundir.incarnations_file(run_dir)) if r["event"] == "end"]


def send(number: signal.Signals) -> None:
    """To this thread alone: others of the process do not hold signals back."""
    signal.pthread_kill(threading.get_ident(), number)


def asked(run_dir: Path) -> str:
    return str((rundir.read_json(rundir.control_file(run_dir, "7.0.0")) or {}).get("why", ""))


def chain(run_dir: Path) -> None:
    for job_id, after in (("7", ""), ("8", "7")):
        rundir.append_json(rundir.jobs_file(run_dir), {"job_id": job_id, "after": after})


def test_a_person_who_stops_a_chain_stops_its_later_jobs(tmp_path: Path) -> None:
    chain(tmp_path)
    report = {"outcome": "stopped", "step": 3, "why": "STOP"}
    stop = [lambda: rundir.write_json(rundir.outcome_file(tmp_path, "7.0.0"), report)]
    assert supervisor(tmp_path, deeds=stop, kind="chain")[0].run() == DONE
    later, allocation, _ = supervisor(tmp_path, "8", code=1, kind="chain")
    assert later.run() == DONE and allocation.starts == 0
    assert [end["outcome"] for end in ends(tmp_path)] == ["stopped"]


def test_a_stop_that_lies_there_starts_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / rundir.STOP).touch()
    run, allocation, slurm = supervisor(tmp_path)
    assert run.run() == DONE and allocation.starts == 0 and not slurm.requeued
    assert "stopped: STOP lies in" in capfd.readouterr().err


def test_what_a_person_must_mend_ends_the_chain(tmp_path: Path) -> None:
    chain(tmp_path)
    assert supervisor(tmp_path, code=2, kind="chain")[0].run() == FATAL  # and nobody could write down why
    assert ends(tmp_path)[0]["outcome"] == "fatal" and "log" in ends(tmp_path)[0]["reason"]
    later, allocation, _ = supervisor(tmp_path, "8", kind="chain")
    assert later.run() == FATAL and allocation.starts == 0
    rundir.stopped_file(tmp_path).unlink()  # as `megamem launch requeue` does
    later, allocation, _ = supervisor(tmp_path, "8", code=2, kind="chain")
    assert later.run() == FATAL and allocation.starts == 1


def test_a_save_that_outlasts_its_notice_does_not_lose_the_job(tmp_path: Path) -> None:
    """The time is over while the ranks still save: the job is back in the queue before SLURM kills them."""
    run, allocation, slurm = supervisor(tmp_path, code=1)

    def time_is_over() -> None:
        assert asked(tmp_path) == "the time limit is near" and not slurm.requeued
        slurm.job_now = replace(slurm.job_now, state="TIMEOUT")
        send(signal.SIGTERM)

    def look() -> None:
        assert slurm.requeued == ["7"] and [end["outcome"] for end in ends(tmp_path)] == ["time_limit"]
        slurm.job_now = replace(slurm.job_now, state="PENDING", restarts=1)

    allocation.deeds = [lambda: send(signal.SIGUSR1), time_is_over, look]
    assert run.run() == REQUEUE
    assert slurm.requeued == ["7"] and len(ends(tmp_path)) == 1


def test_the_ranks_are_told_before_slurm_has_answered(tmp_path: Path) -> None:
    run, allocation, slurm = supervisor(tmp_path, code=1)
    allocation.deeds = [lambda: send(signal.SIGUSR1)]
    told = []

    def slow_job(*, patient: bool = True) -> Job | None:
        if patient:
            told.append(asked(tmp_path))
        return slurm.job_now if patient else None

    allocation.job = slow_job  # type: ignore[method-assign]
    assert run.run() == REQUEUE and told[0] == "SIGUSR1"
    assert asked(tmp_path) == "the time limit is near"


def test_a_job_that_was_cancelled_meanwhile_is_not_revived(tmp_path: Path) -> None:
    run, allocation, slurm = supervisor(tmp_path, code=1)
    states = iter(["RUNNING"] * 3)  # the signal, what was asked of the ranks, and their end
    allocation.deeds = [lambda: send(signal.SIGUSR1)]
    allocation.job = lambda **_: replace(slurm.job_now, state=next(states, "CANCELLED"))  # type: ignore[method-assign]
    assert run.run() == DONE and not slurm.requeued
    assert ends(tmp_path)[0]["outcome"] == "time_limit"


def test_a_node_that_hangs_twice_in_a_row_is_known(tmp_path: Path) -> None:
    line = {"event": "end", "outcome": "hang", "late_nodes": ["node2"]}
    rundir.append_json(rundir.incarnations_file(tmp_path), line)
    assert last_late_nodes(tmp_path) == {"node2"}
    rundir.append_json(rundir.incarnations_file(tmp_path), {**line, "outcome": "crash"})
    assert last_late_nodes(tmp_path) == set()


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        held = Signals("USR1")
        send(signal.SIGHUP)
        send(signal.SIGUSR1)
        assert held.take() == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_terminal_that_has_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def gone(stream: int, data: bytes) -> int:
        tried.append((stream, data))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.write", gone)
    put(STDERR, b"nobody reads this")
    assert tried == [(STDERR, b"nobody reads this")]
