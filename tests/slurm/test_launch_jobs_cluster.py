"""Looking after jobs of a real SLURM: batch scripts that sleep stand in for supervisors, in the directory of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megamem.errors import LaunchError
from megamem.testing.slurm_cluster import SlurmCluster
from megamem_launch import rundir
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.slurm.status import read_status
from megamem_launch.verbs import launch_jobs

SCRIPT = """#!/bin/bash
#SBATCH --job-name=sleeper
#SBATCH --requeue
#SBATCH --open-mode=append
trap 'scontrol requeue $SLURM_JOB_ID' USR1
echo "start ${SLURM_RESTART_COUNT:-0}"
for ((i = 0; i < 600; i++)); do sleep 0.2; done
"""


@pytest.fixture(autouse=True)
def environment(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that the code under test runs talk to the cluster of the tests."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env[name])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one submission."""
    path = tmp_path / "sleeper"
    folder = rundir.launch_dir(path) / "submission-1"
    folder.mkdir(parents=True)
    (rundir.launch_dir(path) / "logs").mkdir()
    (path / "config.yaml").write_text("train:\n  steps: 100\n")
    (folder / "cluster.yaml").write_text("name: lab\nnodes: 2\ncpus_per_node: 4\nranks_per_node: 2\n")
    output = rundir.launch_dir(path) / "logs" / "slurm-%j.log"
    (folder / "script.sbatch").write_text(SCRIPT.replace("--requeue", f"--requeue --nodes=2 --output={output}", 1))
    return path


def submit(cluster: SlurmCluster, run_dir: Path, *options: str) -> str:
    script = rundir.launch_dir(run_dir) / "submission-1" / "script.sbatch"
    number = cluster.run(["sbatch", "--parsable", *options, str(script)]).stdout.strip()
    record(run_dir, number)
    return number


def record(run_dir: Path, number: str, kind: str = "run") -> None:
    line = {"time": 1.0, "job_id": number, "submission": "submission-1", "kind": kind, "name": "sleeper", "after": ""}
    rundir.append_json(rundir.jobs_file(run_dir), line)


def begin_to_train(run_dir: Path, incarnation: str) -> None:
    """What a supervisor and a rank write when they begin."""
    job, restart, attempt = incarnation.split(".")
    line = {"time": 1.0, "incarnation": incarnation, "event": "start", "job_id": job, "restart": int(restart)}
    rundir.append_json(
        rundir.incarnations_file(run_dir), line | {"attempt": int(attempt), "nodes": ["node1", "node2"], "step": 0}
    )
    beat = {"beat": 1, "rank": 0, "host": "node1", "pid": 1, "start_tick": 1, "time": 1.0, "step": 1, "end": 1}
    beat |= {"first_step": 1, "phase": "forward", "sequence": 9, "idle_seconds": 0.0, "seconds": {}}
    rundir.write_json(rundir.live_dir(run_dir, incarnation) / "rank-00000.json", beat)


def status(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert launch_jobs.main("status", [str(run_dir), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def queue(cluster: SlurmCluster) -> list[str]:
    return cluster.run(["squeue", "--noheader", "--format=%A"]).stdout.split()


def test_chain_requeued_then_cancelled(
    cluster: SlurmCluster, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = submit(cluster, run_dir)
    second = submit(cluster, run_dir, f"--dependency=afterany:{first}")
    cluster.wait_state(int(first), {"RUNNING"})
    output = rundir.launch_dir(run_dir) / "logs" / f"slurm-{first}.log"
    cluster.wait(lambda: output.exists() and "start 0" in output.read_text(), "its output")
    seen = status(run_dir, capsys)
    assert seen["state"] == "starting" and len(seen["nodes"]) == 2
    assert seen["jobs"][1]["why"] == f"it starts when job {first} has ended"
    with pytest.raises(LaunchError, match="has not begun to train"):
        launch_jobs.main("requeue", [str(run_dir)])
    begin_to_train(run_dir, f"{first}.0.0")
    assert launch_jobs.main("requeue", [str(run_dir)]) == 0  # the signal reaches the script, which requeues itself
    assert "asked to save" in capsys.readouterr().out
    cluster.wait_state(int(first), {"PENDING"})
    seen = status(run_dir, capsys)
    assert seen["state"] == "pending" and "it may start at" in seen["why"] and seen["requeues"] == 1
    with pytest.raises(LaunchError, match="waits in the queue already"):
        launch_jobs.main("requeue", [str(run_dir)])
    cluster.release(int(first))
    cluster.wait_state(int(first), {"RUNNING"})
    cluster.wait(lambda: "start 1" in output.read_text(), "the output of its second start")
    assert launch_jobs.main("requeue", [str(run_dir), "--now"]) == 0
    cluster.wait(lambda: status(run_dir, capsys)["requeues"] == 2, "the second requeue")
    assert launch_jobs.main("logs", [str(run_dir), "--job"]) == 0
    assert f"job {first} | start 1" in capsys.readouterr().out
    assert launch_jobs.main("cancel", [str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert f"job {first}" in printed and f"job {second}" in printed
    assert status(run_dir, capsys)["state"] == "cancelled"
    assert queue(cluster) == []
    with pytest.raises(LaunchError, match="was cancelled, which is final"):
        launch_jobs.main("requeue", [str(run_dir)])
    assert queue(cluster) == []


def test_requeue_of_ended_runs(cluster: SlurmCluster, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = submit(cluster, run_dir)
    cluster.wait_state(int(number), {"RUNNING"})
    cluster.run(["scancel", number])
    cluster.wait_state(int(number), {"CANCELLED"})
    assert status(run_dir, capsys)["state"] == "cancelled"
    assert launch_jobs.main("requeue", [str(run_dir)]) == 0  # not through `cancel`: nothing says that it was final
    again = queue(cluster)
    assert len(again) == 1 and again != [number]
    assert [line["job_id"] for line in rundir.read_lines(rundir.jobs_file(run_dir))] == [number, *again]
    cluster.run(["scancel", *again])
    rundir.write_json(rundir.finished_file(run_dir), {"step": 100, "time": 1.0})
    with pytest.raises(LaunchError, match="has trained all its 100 steps"):
        launch_jobs.main("requeue", [str(run_dir)])
    cluster.wait(lambda: queue(cluster) == [], "an empty queue")


def test_held_jobs_are_released(cluster: SlurmCluster, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = submit(cluster, run_dir, "--hold")
    assert "held" in status(run_dir, capsys)["why"]
    assert launch_jobs.main("requeue", [str(run_dir)]) == 0
    cluster.wait_state(int(number), {"RUNNING"})


def test_points_of_an_array(cluster: SlurmCluster, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [run_dir / f"lr={number}" for number in range(3)]
    listed = [{"name": point.name, "run_dir": str(point)} for point in points]
    number = submit(cluster, run_dir, "--array=0-2%1")
    rundir.write_json(rundir.launch_dir(run_dir) / "sweep.json", {"points": listed})
    for task, point in enumerate(points):
        (rundir.launch_dir(point) / "submission-1").mkdir(parents=True)
        record(point, f"{number}_{task}", kind="sweep")
    cluster.wait(lambda: status(run_dir, capsys)["points"][0]["state"] == "starting", "the first task")
    seen = status(run_dir, capsys)["points"]
    assert [point["state"] for point in seen] == ["starting", "pending", "pending"]
    assert "as many jobs of its sweep run as may at a time" in seen[2]["why"]
    assert read_status(points[1], Slurm()).state == "pending"  # a point by itself
    assert launch_jobs.main("cancel", [str(points[1])]) == 0
    assert [point["state"] for point in status(run_dir, capsys)["points"]] == ["starting", "cancelled", "pending"]
    assert launch_jobs.main("cancel", [str(run_dir)]) == 0
    assert queue(cluster) == []


def test_one_point_is_submitted_again(cluster: SlurmCluster, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point = run_dir / "lr=2"
    number = submit(cluster, run_dir, "--array=0-2")
    rundir.write_json(
        rundir.launch_dir(run_dir) / "sweep.json", {"points": [{"name": point.name, "run_dir": str(point)}]}
    )
    record(point, f"{number}_2", kind="sweep")
    shutil.copytree(rundir.launch_dir(run_dir) / "submission-1", rundir.launch_dir(point) / "submission-1")
    (rundir.launch_dir(point) / "submission-1" / "script.sbatch").unlink()  # points share that of their sweep
    cluster.run(["scancel", number])
    cluster.wait(lambda: queue(cluster) == [], "an empty queue")
    assert launch_jobs.main("requeue", [str(point)]) == 0
    (again,) = cluster.run(["squeue", "--noheader", "--array", "--format=%i"]).stdout.split()
    assert again.endswith("_2") and again in capsys.readouterr().out
    assert status(run_dir, capsys)["points"][0]["state"] in ("pending", "starting")
    assert launch_jobs.main("cancel", [str(point)]) == 0
    assert queue(cluster) == []


def test_scheduler_interface(cluster: SlurmCluster, run_dir: Path) -> None:
    slurm = Slurm()
    number = submit(cluster, run_dir, "--exclude=node3", "--comment=JobState=FAILED Reason=none")
    cluster.wait_state(int(number), {"RUNNING"})
    job = slurm.job(number)
    assert job is not None
    assert (job.state, job.restarts, job.excluded, job.partition) == ("RUNNING", 0, "node3", "main")
    assert slurm.hostnames(job.nodes) == ["node1", "node2"]
    assert job.started is not None and job.ends is not None and job.ends > job.started
    assert slurm.job("999999999") is None and slurm.jobs(["999999999", number]) == slurm.jobs([number])
    assert set(slurm.nodes(["node1", "node9"])) == {"node1"} and slurm.node("node9") is None
    assert slurm.available_nodes("main") == ["node1", "node2", "node3"]
    cluster.run(["scontrol", "update", "nodename=node3", "state=drain", "reason=bad disk"])
    assert slurm.available_nodes("main") == ["node1", "node2"]
    node = slurm.node("node3")
    assert node is not None and node.healthy and "DRAIN" in node.state and node.reason.startswith("bad disk")
    cluster.set_down("node2")
    cluster.wait_state(int(number), {"PENDING"})
    lost = slurm.node("node2")
    assert lost is not None and not lost.healthy
    slurm.update(number, ExcNodeList="node2")
    job = slurm.job(number)
    assert job is not None and job.excluded == "node2" and job.restarts == 1
    slurm.cancel([number, "999999999"])
    cluster.wait(lambda: slurm.jobs([number])[0].state == "CANCELLED", "the end of the job")
