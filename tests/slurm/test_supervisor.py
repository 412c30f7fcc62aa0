"""The supervisor in the real cluster: both ways to start ranks, a rank that dies, a run directory that is not shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megamem.observe.journal import read_journal
from megamem.testing.slurm_cluster import SlurmCluster
from megamem_launch import rundir
from megamem_launch.watch.beats import read_beats

pytestmark = pytest.mark.timeout(600)

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SECONDS = 240.0


def submit(cluster: SlurmCluster, folder: Path, data: Path, *settings: str, **slurm: object) -> tuple[Path, int]:
    """A run of two nodes with two ranks each, and its job."""
    description = {
        "nodes": 2,
        "ranks_per_node": 2,
        "cpus_per_node": 4,
        "slurm": {"time": "30", "environment": {"OMP_NUM_THREADS": "1"}, **slurm},
    }
    folder.mkdir(exist_ok=True)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(description))
    words = [
        *(str(CONFIG), f"runs_dir={folder}", "name=run", f"data.path={data}", "tracking.mlflow=false"),
        *("train.eval_batches=1", "train.eval_interval=1000", *settings),
        *("--cluster", str(folder / "cluster.yaml")),
    ]
    command = [sys.executable, "-m", "megamem.cli", "launch", "slurm", *words]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    run = folder / "run"
    return run, int(rundir.read_lines(rundir.jobs_file(run))[-1]["job_id"])


def history(run: Path) -> list[dict]:
    return rundir.read_lines(rundir.incarnations_file(run))


def losses(run: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_journal(run / "journal.jsonl") if e["kind"] == "step"}


def test_both_modes_train_alike_and_a_dead_rank_is_started_again(
    cluster: SlurmCluster, prepared_tiny: Path, tmp_path: Path
) -> None:
    """The nodes are checked first, by torchrun's mode; a rank that srun started is killed; the losses are the same."""
    settings = ("train.steps=30", "checkpoint.interval=5")
    whole, job = submit(cluster, tmp_path / "torchrun", prepared_tiny, *settings, mode="torchrun")
    cluster.wait_state(job, {"COMPLETED"}, SECONDS)
    incarnation = history(whole)[0]["incarnation"]
    found = rundir.read_json(rundir.preflight_file(whole, incarnation))
    assert found is not None and set(found) == {"node1", "node2"}
    assert all(node["shared"] and node["network"]["all_reduce_seconds"] > 0 for node in found.values())
    logs = sorted(path.name for path in rundir.log_dir(whole, incarnation).iterdir())
    assert logs == ["node1-0.log", "node1-1.log", "node2-2.log", "node2-3.log", "supervisor.log"]
    assert "step 1/30" in (whole / "launch" / "logs" / f"slurm-{job}.log").read_text()

    run, job = submit(cluster, tmp_path / "srun", prepared_tiny, *settings, mode="srun", preflight=False)
    cluster.wait(lambda: (run / "checkpoints" / "latest").exists(), "the first checkpoint", SECONDS)
    live = rundir.live_dir(run, history(run)[0]["incarnation"])
    assert set(read_beats(live)) == {0, 1, 2, 3}
    victim = next(p for p in cluster.node_processes("node2") if "megamem_launch.supervise.rank" in p.argv)
    os.kill(victim.pid, signal.SIGKILL)
    cluster.wait_state(job, {"COMPLETED"}, SECONDS)
    assert [entry.get("outcome", "start") for entry in history(run)] == ["start", "crash", "start", "finished"]
    assert history(run)[2]["step"] > 0
    assert losses(run) == losses(whole)


def test_a_run_directory_that_is_not_shared_is_found(
    cluster: SlurmCluster, prepared_tiny: Path, tmp_path: Path
) -> None:
    """Another directory of the same name is mounted over it on the second node, as /tmp is one on every node."""
    if not cluster.settings.isolated:
        pytest.skip("nodes without namespaces share all directories")
    folder = tmp_path / "apart"
    folder.mkdir()
    slurmd = next(p for p in cluster.node_processes("node2") if p.name == "slurmd")
    inside = ["nsenter", f"--target={slurmd.pid}", "--mount", "--"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(folder)], check=True)
    try:
        run, job = submit(cluster, folder, prepared_tiny, "train.steps=5")
        state = cluster.wait_state(job, {"FAILED"}, SECONDS)
    finally:
        subprocess.run([*inside, "umount", str(folder)], check=True)
    assert state["ExitCode"] == "2:0"
    end = history(run)[-1]
    assert end["outcome"] == "preflight" and not end["bad_nodes"]
    assert f"{run} is not the same directory on node2 as on node1; set runs_dir" in end["reason"]


@pytest.mark.slow
def test_points_of_a_sweep_train_and_are_shown_under_one_heading(
    cluster: SlurmCluster, prepared_tiny: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("grid: {optimizer.lr: [0.001, 0.01]}\n")
    settings = ("train.steps=6", "checkpoint.interval=3", "tracking.mlflow=true", "tracking.system_metrics=false")
    parent, job = submit(cluster, tmp_path / "runs", prepared_tiny, *settings, "--sweep", str(sweep), preflight=False)
    squeue = ["squeue", "--noheader", f"--jobs={job}"]
    cluster.wait(lambda: not cluster.run(squeue, check=False).stdout, "the end of the array", 2 * SECONDS)
    points = [Path(point["run_dir"]) for point in json.loads((parent / "launch" / "sweep.json").read_text())["points"]]
    assert [path.name for path in points] == ["lr=0.001", "lr=0.01"]
    for point in points:
        assert [entry.get("outcome", "start") for entry in history(point)] == ["start", "finished"]
    first, second = (losses(point) for point in points)
    assert first.keys() == second.keys() == set(range(1, 7)) and first[1] == second[1] and first[6] != second[6]

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{parent.parent}/mlflow.db")
    runs = [client.get_run((point / "mlflow_run_id").read_text().strip()) for point in points]
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    (heading,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert client.get_run(heading).info.run_name == "run"
    assert list((parent.parent / "mlartifacts").rglob("config.yaml")) and not list(tmp_path.rglob("mlruns"))
