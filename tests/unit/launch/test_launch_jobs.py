"""Status, logs, history, cancel and requeue of runs, from their files and from jobs that a stand-in for SLURM holds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megamem.errors import LaunchError
from megamem.observe.heartbeat import start_tick
from megamem_launch import rundir
from megamem_launch.slurm.client import SchedulerUnavailable
from megamem_launch.slurm.control import cancel, requeue
from megamem_launch.slurm.history import read_history
from megamem_launch.slurm.logs import Log, find_logs, follow, job_logs
from megamem_launch.slurm.parse import Job
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.slurm.status import read_status, read_sweep_status
from megamem_launch.verbs import launch_jobs


def job(
    number: str,
    state: str,
    *,
    restarts: int = 0,
    reason: str = "",
    exit_code: str = "",
    array: str = "",
    task: str = "",
) -> Job:
    nodes = "node[1-2]" if state in ("RUNNING", "COMPLETING") else ""
    return Job(
        number=number,
        array=array,
        task=task,
        name="run",
        state=state,
        reason=reason,
        partition="main",
        node_count=2,
        nodes=nodes,
        batch_host="",
        restarts=restarts,
        submitted=1.0,
        eligible=None,
        started=None,
        ends=None,
        preempted=None,
        dependency="",
        exit_code=exit_code,
    )


class Cluster(Slurm):
    """Holds jobs and obeys at once."""

    def __init__(self, *jobs: Job) -> None:
        self.held = {job.id: job for job in jobs}
        self.orders: list[tuple[str, ...]] = []
        self.stubborn = False
        self.shown: Job | None = None
        """What scontrol shows."""

    def job(self, job_id: str) -> Job | None:
        return self.shown

    def jobs(self, job_ids: Sequence[str]) -> list[Job]:
        return [job for job in self.held.values() if {job.id, job.array or job.number} & set(job_ids)]

    def hostnames(self, nodes: str) -> list[str]:
        return ["node1", "node2"] if nodes else []

    def cancel(self, job_ids: Sequence[str]) -> None:  # type: ignore[override]
        self.orders.append(("cancel", *job_ids))
        if not self.stubborn:
            self.held = {name: job for name, job in self.held.items() if name not in job_ids}

    def signal(self, target: str, signal: str, *, batch: bool = False) -> None:
        self.orders.append(("signal", target, signal, str(batch)))

    def requeue(self, job_id: str) -> None:
        self.orders.append(("requeue", job_id))

    def release(self, job_id: str) -> None:
        self.orders.append(("release", job_id))


class Silent(Slurm):
    """Does not answer."""

    def jobs(self, job_ids: Sequence[str]) -> list[Job]:
        raise SchedulerUnavailable("SLURM did not answer")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "one"
    folder = rundir.launch_dir(path) / "submission-1"
    folder.mkdir(parents=True)
    (path / "config.yaml").write_text("train:\n  steps: 100\n")
    (folder / "cluster.yaml").write_text(
        "name: lab\nnodes: 2\ncpus_per_node: 4\nranks_per_node: 2\nslurm: {signal: USR2}\n"
    )
    return path


def submitted(run_dir: Path, *numbers: str, kind: str = "run") -> None:
    for number in numbers:
        line = {"time": 1.0, "job_id": number, "submission": "submission-1", "kind": kind, "name": "one", "after": ""}
        rundir.append_json(rundir.jobs_file(run_dir), line)


def started(run_dir: Path, incarnation: str, step: int = 0) -> None:
    number, restart, attempt = incarnation.rsplit(".", 2)
    line = {"time": 10.0, "incarnation": incarnation, "event": "start", "job_id": number, "restart": int(restart)}
    line |= {"attempt": int(attempt), "nodes": ["node1", "node2"], "step": step}
    rundir.append_json(rundir.incarnations_file(run_dir), line)


def ended(run_dir: Path, incarnation: str, outcome: str, reason: str = "because", step: int = 40) -> None:
    line = {
        "time": 75.0,
        "incarnation": incarnation,
        "event": "end",
        "outcome": outcome,
        "reason": reason,
        "step": step,
    }
    line |= {"bad_nodes": {"node3": "DOWN"}, "stragglers": {"text": "rank 3 (node2) 1.5x"}}
    rundir.append_json(rundir.incarnations_file(run_dir), line)


def beats(run_dir: Path, incarnation: str, *, step: int = 5, ranks: int = 2) -> None:
    for rank in range(ranks):
        record = {
            "beat": 1,
            "rank": rank,
            "host": "node1",
            "pid": 1,
            "start_tick": 1,
            "time": time.time(),
            "step": step,
        }
        record |= {"first_step": 1, "phase": "forward", "sequence": 9, "idle_seconds": 0.0, "seconds": {}, "end": 1}
        rundir.write_json(rundir.live_dir(run_dir, incarnation) / f"rank-{rank:05d}.json", record)


def journal(run_dir: Path, steps: int) -> None:
    entries = [
        {"kind": "step", "step": n, "step_seconds": 2.0, "tokens_per_second": 1000.0} for n in range(1, steps + 1)
    ]
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"kind": "st')


def test_running_with_speed_and_time_left(run_dir: Path) -> None:
    submitted(run_dir, "7", "8", kind="chain")
    started(run_dir, "7.1.0")
    beats(run_dir, "7.1.0")
    journal(run_dir, 40)
    rundir.write_json(rundir.excluded_file(run_dir), {"node3": {"reason": "DOWN", "time": 1.0, "incarnation": "7.0.0"}})
    status = read_status(run_dir, Cluster(job("8", "PENDING", reason="Dependency"), job("7", "RUNNING", restarts=1)))
    assert (status.state, status.why, status.step, status.total_steps) == ("running", "", 40, 100)
    assert (status.tokens_per_second, status.eta_seconds, status.ranks) == (1000.0, 120.0, 2)
    assert status.heartbeat_age is not None and status.heartbeat_age < 5
    assert (status.nodes, status.requeues, status.excluded) == (["node1", "node2"], 1, {"node3": "DOWN"})
    assert [(j.id, j.state) for j in status.jobs] == [("7", "RUNNING"), ("8", "PENDING")]


def test_steps_are_those_of_the_last_submission(run_dir: Path) -> None:
    for number, steps in ((2, 200), (10, 300)):
        folder = rundir.launch_dir(run_dir) / f"submission-{number}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    submitted(run_dir, "7")
    assert read_status(run_dir, Cluster(job("7", "PENDING"))).total_steps == 300


def test_a_new_start_of_the_job_is_not_taken_for_the_one_before(run_dir: Path) -> None:
    submitted(run_dir, "7")
    started(run_dir, "7.0.0")
    beats(run_dir, "7.0.0")
    status = read_status(run_dir, Cluster(job("7", "RUNNING", restarts=1)))
    assert status.state == "starting" and "supervisor" in status.why


@pytest.mark.parametrize(
    ("jobs", "outcome", "state", "why"),
    [
        ([job("7", "PENDING", reason="BeginTime", restarts=1)], "time_limit", "pending", "job 7: it may not start yet"),
        ([job("7", "RUNNING")], "crash", "starting", "crash: because"),
        ([job("7", "COMPLETING")], "crash", "ending", "job 7"),
        ([job("7", "COMPLETED")], "finished", "finished", ""),
        ([job("7", "FAILED", exit_code="1:0")], "crash", "failed", "crash: because"),
        ([], "crash", "failed", "crash: because"),
        ([job("7", "COMPLETED")], "stopped", "stopped", "because"),
        ([job("7", "FAILED", exit_code="75:0")], "preempted", "stopped", "because"),
        ([job("7", "NODE_FAIL")], "", "failed", "(job 7: a node failed"),
        ([], "", "failed", "ended without a word"),
        ([job("7", "CANCELLED")], "", "cancelled", "job 7"),
    ],
)
def test_states(run_dir: Path, jobs: list[Job], outcome: str, state: str, why: str) -> None:
    submitted(run_dir, "7")
    started(run_dir, "7.0.0")
    if outcome:
        ended(run_dir, "7.0.0", outcome)
    status = read_status(run_dir, Cluster(*jobs))
    assert status.state == state and why in status.why


def test_a_job_whose_supervisor_never_started(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    submitted(run_dir, "7")
    status = read_status(run_dir, Cluster(job("7", "FAILED", exit_code="127:0")))
    assert status.state == "failed" and "exit code 127" in status.why and "logs" in status.why
    assert read_status(run_dir, Cluster()).why == "SLURM has forgotten it"


def test_marks_of_the_end(run_dir: Path) -> None:
    submitted(run_dir, "7", "8")
    rundir.write_json(rundir.finished_file(run_dir), {"step": 100, "time": 1.0})
    assert read_status(run_dir, Cluster(job("8", "PENDING", reason="Dependency"))).state == "finished"
    rundir.write_json(rundir.cancelled_file(run_dir), {"time": 1.0})
    assert read_status(run_dir, Cluster(job("8", "PENDING"))).state == "ending"
    assert read_status(run_dir, Cluster()).state == "cancelled"


def test_without_an_answer_nothing_is_claimed(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(run_dir, "7")
    started(run_dir, "7.0.0")
    journal(run_dir, 40)
    status = read_status(run_dir, Silent())
    assert (status.state, status.why, status.step) == ("unknown", "SLURM did not answer", 40)
    assert status.jobs[0].state == "UNKNOWN" and status.eta_seconds is None
    monkeypatch.setattr(launch_jobs, "Slurm", Silent)
    assert launch_jobs.main("status", [str(run_dir)]) == 1
    assert "SLURM did not answer" in capsys.readouterr().out


def test_marks_tell_the_end_where_there_is_no_slurm(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    submitted(run_dir, "7")
    assert read_status(run_dir, Slurm()).state == "unknown"
    rundir.write_json(rundir.stopped_file(run_dir), {"reason": "stopped by a person", "exit_code": 0})
    status = read_status(run_dir, Slurm())
    assert (status.state, status.why) == ("stopped", "stopped by a person")
    rundir.write_json(rundir.finished_file(run_dir), {"step": 100})
    assert read_status(run_dir, Slurm()).state == "finished"
    rundir.write_json(rundir.cancelled_file(run_dir), {"time": 1.0})
    assert read_status(run_dir, Slurm()).state == "cancelled"


def test_a_stop_that_lies_there_is_told(run_dir: Path) -> None:
    submitted(run_dir, "7")
    (run_dir / rundir.STOP).touch()
    waiting = read_status(run_dir, Cluster(job("7", "PENDING", reason="Resources")))
    assert waiting.state == "pending" and "remove" in waiting.why
    over = read_status(run_dir, Cluster(job("7", "COMPLETED")))
    assert over.state == "stopped" and over.why.startswith("STOP lies in")


def test_local_runs_need_no_slurm(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    name = f"local-{os.getpid()}.0.0"
    started(run_dir, name)
    beats(run_dir, name)
    lease = {
        "incarnation": name,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start_tick": start_tick(os.getpid()),
        "time": 1.0,
    }
    rundir.write_json(rundir.lease_file(run_dir), lease)
    assert launch_jobs.main("status", ["one", "--runs-dir", str(run_dir.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"
    rundir.write_json(
        rundir.lease_file(run_dir), lease | {"start_tick": 1}
    )  # the process that has this number now is another
    assert read_status(run_dir, Slurm()).state == "failed"
    with pytest.raises(LaunchError, match="launch local"):
        requeue(run_dir, Slurm(), now=False)


def test_local_supervisor_is_cancelled(run_dir: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    threading.Thread(target=process.wait, daemon=True).start()
    name = f"local-{process.pid}.0.0"
    started(run_dir, name)
    lease = {
        "incarnation": name,
        "host": socket.gethostname(),
        "pid": process.pid,
        "start_tick": start_tick(process.pid),
    }
    rundir.write_json(rundir.lease_file(run_dir), lease)
    assert cancel([run_dir], Slurm(), 20) == [f"supervisor {process.pid}"]
    assert rundir.cancelled_file(run_dir).exists()
    assert process.wait() == -15
    rundir.write_json(rundir.lease_file(run_dir), lease | {"host": "elsewhere"})
    beats(run_dir, name)
    with pytest.raises(LaunchError, match="of elsewhere; cancel it there"):
        cancel([run_dir], Slurm(), 20)


def test_a_sweep_lists_its_points(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [run_dir / "lr=1", run_dir / "lr=2"]
    rundir.write_json(
        rundir.launch_dir(run_dir) / "sweep.json", {"points": [{"name": p.name, "run_dir": str(p)} for p in points]}
    )
    submitted(run_dir, "9", kind="sweep")
    for number, point in enumerate(points):
        submitted(point, f"9_{number}", kind="sweep")
    cluster = Cluster(
        job("10", "RUNNING", array="9", task="0"), job("9", "PENDING", array="9", task="1", reason="JobArrayTaskLimit")
    )
    assert [status.state for status in read_sweep_status(run_dir, points, cluster)] == ["starting", "pending"]
    assert [status.state for status in read_sweep_status(run_dir, points, Silent())] == ["unknown", "unknown"]
    monkeypatch.setattr(launch_jobs, "Slurm", lambda: cluster)
    assert launch_jobs.main("status", [str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "lr=1" in printed and "pending" in printed
    with pytest.raises(LaunchError, match="is a sweep; name one of its points"):
        launch_jobs.main("history", [str(run_dir)])
    assert launch_jobs.main("cancel", [str(run_dir)]) == 0
    assert cluster.orders == [("cancel", "9_1", "9_0")] or cluster.orders == [("cancel", "9_0", "9_1")]
    assert all(rundir.cancelled_file(path).exists() for path in [run_dir, *points])


def test_jobs_that_prepare_data(run_dir: Path) -> None:
    submitted(run_dir, "5", "6", kind="data")
    merge = job("6", "PENDING", reason="Dependency")
    tasks = [job(str(20 + n), state, array="5", task=str(n)) for n, state in enumerate(("COMPLETED", "RUNNING"))]
    status = read_status(run_dir, Cluster(merge, *tasks))
    assert (status.state, [j.state for j in status.jobs]) == ("running", ["RUNNING", "PENDING"])
    assert read_status(run_dir, Cluster(merge)).state == "pending"
    done = Cluster(job("6", "COMPLETED"), tasks[0])
    assert read_status(run_dir, done).why == "its jobs have ended, and the data is not there"
    broken = job("21", "FAILED", array="5", task="1", exit_code="1:0")
    assert "job 5_1: its script ended with exit code 1" in read_status(run_dir, Cluster(tasks[0], broken)).why
    assert read_status(run_dir, Cluster()).state == "failed"
    (run_dir / "data.json").write_text("{}")  # of a directory without the ending .parts it is its own
    assert read_status(run_dir, done).state == read_status(run_dir, Cluster()).state == "finished"
    (run_dir / "data.json").unlink()
    line = {"time": 2.0, "job_id": "30", "submission": "submission-2", "kind": "data", "name": "one", "after": ""}
    rundir.append_json(rundir.jobs_file(run_dir), line)
    # The failure is that of the submission before.
    again = Cluster(tasks[0], broken, job("30", "PENDING", reason="Resources"))
    assert read_status(run_dir, again).state == "pending"
    directory = rundir.launch_dir(run_dir) / "logs"
    directory.mkdir()
    for task in (10, 9):
        (directory / f"slurm-5_{task}.log").write_text(f"share {task}\n")
    assert [log.tail(1) for log in find_logs(run_dir)] == [["share 9"], ["share 10"]]
    with pytest.raises(LaunchError, match="prepares data"):
        requeue(run_dir, Cluster(merge), now=False)


def test_cancel_marks_first_and_is_final(run_dir: Path) -> None:
    submitted(run_dir, "7", "8")
    cluster = Cluster(job("7", "RUNNING"), job("8", "PENDING"))
    assert cancel([run_dir], cluster, 20) == ["job 7", "job 8"]
    assert cluster.orders == [("cancel", "7", "8")]
    assert cancel([run_dir], cluster, 20) == []  # it was cancelled already
    with pytest.raises(LaunchError, match="was cancelled, which is final"):
        requeue(run_dir, cluster, now=True)
    stubborn = Cluster(job("7", "COMPLETING"))
    stubborn.stubborn = True
    with pytest.raises(LaunchError, match="job 7 still lives after 0 s"):
        cancel([run_dir], stubborn, 0)


def test_output_that_a_node_could_not_open(run_dir: Path) -> None:
    submitted(run_dir, "7")
    why = "job 7: the node could not open RUN/launch/logs; set runs_dir to a path that all nodes share"
    cluster = Cluster(job("7", "FAILED", reason="JobLaunchFailure"))
    cluster.shown = job("7", "FAILED", reason="JobLaunchFailure", exit_code="0:53")
    status = read_status(run_dir, cluster)
    assert (status.state, status.why) == ("failed", why)
    cluster.shown = job("7", "FAILED", reason="JobLaunchFailure", exit_code="0:9")
    assert "its script was ended by signal 9" in read_status(run_dir, cluster).why


def test_requeue_lets_the_supervisor_save(run_dir: Path) -> None:
    submitted(run_dir, "7")
    cluster = Cluster(job("7", "RUNNING"))
    for begin in (lambda: None, lambda: started(run_dir, "7.0.0")):
        begin()
        with pytest.raises(LaunchError, match="has not begun to train"):
            requeue(run_dir, cluster, now=False)
    beats(run_dir, "7.0.0")
    assert "asked to save" in requeue(run_dir, cluster, now=False)
    assert "begins anew, as it has no checkpoint" in requeue(run_dir, cluster, now=True)
    assert cluster.orders == [("signal", "7", "USR2", "True"), ("requeue", "7")]
    waiting = Cluster(job("7", "PENDING", reason="Resources"))
    with pytest.raises(LaunchError, match="waits in the queue already: the nodes that it needs are in use"):
        requeue(run_dir, waiting, now=False)
    held = Cluster(job("7", "PENDING", reason="launch failed requeued held"))
    assert "was held" in requeue(run_dir, held, now=False) and held.orders == [("release", "7")]


def test_requeue_of_a_finished_run_is_refused(run_dir: Path) -> None:
    submitted(run_dir, "7")
    rundir.write_json(rundir.finished_file(run_dir), {"step": 100, "time": 1.0})
    cluster = Cluster(job("7", "COMPLETED"))
    with pytest.raises(LaunchError, match="has trained all its 100 steps"):
        requeue(run_dir, cluster, now=True)
    assert cluster.orders == []


def test_requeue_needs_a_job_that_may_be_requeued(run_dir: Path) -> None:
    submitted(run_dir, "7")
    cluster_file = rundir.launch_dir(run_dir) / "submission-1" / "cluster.yaml"
    cluster_file.write_text(cluster_file.read_text().replace("{signal: USR2}", "{requeue: false}"))
    with pytest.raises(LaunchError, match=r"slurm\.requeue=false"):
        requeue(run_dir, Cluster(job("7", "RUNNING")), now=True)


def test_a_refused_requeue_leaves_the_wish_to_stop(run_dir: Path) -> None:
    submitted(run_dir, "7")
    stop, stopped = run_dir / rundir.STOP, rundir.stopped_file(run_dir)
    stop.touch()
    rundir.write_json(stopped, {"reason": "asked"})
    with pytest.raises(LaunchError, match="waits in the queue already"):
        requeue(run_dir, Cluster(job("7", "PENDING")), now=False)
    assert stop.exists() and rundir.read_json(stopped) == {"reason": "asked"}


def test_requeue_submits_an_ended_run_again(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(run_dir, "7")
    with pytest.raises(LaunchError, match="is gone; submit with"):
        requeue(run_dir, Cluster(job("7", "FAILED")), now=False)
    script = rundir.launch_dir(run_dir) / "submission-1" / "script.sbatch"
    script.write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\necho 31\n')
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    for command in ("sbatch", "squeue"):
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "job 31 was submitted" in requeue(run_dir, Cluster(job("7", "FAILED")), now=False)
    assert str(script) in (tmp_path / "said").read_text()
    assert [line["job_id"] for line in rundir.read_lines(rundir.jobs_file(run_dir))] == ["7", "31"]


def test_history(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    submitted(run_dir, "7")
    started(run_dir, "7.0.0")
    ended(run_dir, "7.0.0", "hang", "rank 3 is late [/in] a collective")
    started(run_dir, "7.0.1", step=40)
    started(run_dir, "7.1.0", step=60)
    with rundir.incarnations_file(run_dir).open("a") as file:
        file.write('{"event": "start", "incarnation": "torn"}\n{"event"')
    first, lost, last = read_history(run_dir)
    assert (first.first_step, first.last_step, first.outcome, first.bad_nodes) == (0, 40, "hang", {"node3": "DOWN"})
    assert (lost.outcome, lost.first_step, last.outcome) == ("lost", 40, "")
    assert launch_jobs.main("history", [str(run_dir), "--json"]) == 0
    incarnations = json.loads(capsys.readouterr().out)["incarnations"]
    assert [one["incarnation"] for one in incarnations] == ["7.0.0", "7.0.1", "7.1.0"]
    assert incarnations[0]["stragglers"] == "rank 3 (node2) 1.5x"
    assert launch_jobs.main("history", [str(run_dir)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "hang" in printed and "[/in]" in printed and "(runs)" in printed


def write_logs(run_dir: Path, incarnation: str, text: Callable[[int], str]) -> Path:
    directory = rundir.log_dir(run_dir, incarnation)
    directory.mkdir(parents=True)
    for rank in (10, 2, 0):
        (directory / f"gpu-{rank // 8}-{rank}.log").write_text(text(rank))
    (directory / "supervisor.log").write_text("it starts\n")
    return directory


def test_tail_of_all_ranks(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match="no output of jobs yet"):
        find_logs(run_dir)
    started(run_dir, "7.0.0")
    write_logs(run_dir, "7.0.0", lambda rank: "".join(f"{n} of {rank}\n" for n in range(30)) + "10%\r20%\rla\xe9")
    assert launch_jobs.main("logs", [str(run_dir), "--lines", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == ["supervisor | it starts"] + [
        f"gpu-{rank // 8} rank {rank} | {line}" for rank in (0, 2, 10) for line in (f"29 of {rank}", "la\xe9")
    ]
    assert launch_jobs.main("logs", [str(run_dir), "--rank", "10", "--lines", "1"]) == 0
    assert capsys.readouterr().out == "gpu-1 rank 10 | la\xe9\n"
    for arguments, message in (
        (["--rank", "4"], "no log of rank 4; there are 0 to 10"),
        (["--incarnation", "8.0.0"], "no incarnation 8.0.0; it has 7.0.0"),
        (["--job", "--rank", "1"], "leave out one"),
    ):
        with pytest.raises(LaunchError, match=message):
            launch_jobs.main("logs", [str(run_dir), *arguments])


def test_tail_of_a_long_file_reads_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"{n:07d}{'x' * 93}\n" for n in range(5000)))
    log = Log(path, "job 1")
    assert [line[:7] for line in log.tail(3000)] == [f"{n:07d}" for n in range(2000, 5000)]
    assert Log(path, "job 1").tail(0) == []


def test_what_jobs_wrote(run_dir: Path) -> None:
    submitted(run_dir, "7", "31")
    directory = rundir.launch_dir(run_dir) / "logs"
    directory.mkdir()
    for number in ("31", "7", "100"):
        (directory / f"slurm-{number}.log").write_text(f"{number}\n")
    assert [(log.source, log.tail(5)) for log in job_logs(run_dir)] == [("job 7", ["7"]), ("job 31", ["31"])]
    point = run_dir / "lr=1"
    submitted(point, "31_0")
    (directory / "slurm-31_0.log").write_text("point\n")
    assert [log.tail(1) for log in find_logs(point)] == [["point"]]


def test_following_goes_on_with_the_next_incarnation(run_dir: Path) -> None:
    started(run_dir, "7.0.0")
    directory = write_logs(run_dir, "7.0.0", lambda rank: "old\nlast\n")
    seen = follow(run_dir, lambda: find_logs(run_dir, rank=2), 1)
    log, line = next(seen)
    assert (log.source, line) == ("gpu-0 rank 2", "last")
    with (directory / "gpu-0-2.log").open("a") as file:
        file.write("half")
        file.flush()
        file.write(" a line\nrest")
    assert next(seen)[1] == "half a line"
    started(run_dir, "7.1.0")
    write_logs(run_dir, "7.1.0", lambda rank: "next\n")
    rundir.write_json(rundir.finished_file(run_dir), {"step": 1, "time": 1.0})
    assert [line for _, line in seen] == ["rest", "next"]


def test_runs_that_were_not_launched(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="nearest: one"):
        launch_jobs.main("status", ["ome", "--runs-dir", str(run_dir.parent)])
    plain = run_dir.parent / "plain"
    plain.mkdir()
    (plain / "journal.jsonl").write_text("")
    with pytest.raises(LaunchError, match="not started by `megamem launch`"):
        launch_jobs.main("status", [str(plain)])
