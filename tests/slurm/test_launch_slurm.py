"""`megamem launch slurm` and `data` against a real SLURM: what is submitted, what is refused, and that refusals leave nothing.

The supervisor is stood in for by a script, so that no test here trains; tests/slurm/test_surviving.py does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from megamem.errors import ConfigError, LaunchError, MegamemError
from megamem.testing.slurm_cluster import SlurmCluster
from megamem_data.prepared import PreparedData
from megamem_launch.cluster import Cluster, load_cluster
from megamem_launch.config import load_config
from megamem_launch.rundir import cancelled_file, finished_file, jobs_file, read_json, read_lines, write_json
from megamem_launch.slurm import submit
from megamem_launch.slurm.scheduler import Slurm
from megamem_launch.slurm.status import read_status
from megamem_launch.verbs import launch

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
STAND_IN = """#!/bin/bash
# python -m megamem_launch.supervise SUBMISSION
echo "begin $SLURM_JOB_ID $(date +%s.%N)" >> "$3/../trace"
env > "$3/env"
printf '%s\\n' "$PWD" "$@" > "$3/arguments"
sleep 0.6
while [ -e hold ]; do sleep 0.1; done
echo "end $SLURM_JOB_ID $(date +%s.%N)" >> "$3/../trace"
"""


class Account:
    """A user's directory on the cluster."""

    def __init__(self, cluster: SlurmCluster, home: Path) -> None:
        self.cluster = cluster
        self.home = home
        (home / "data").mkdir(parents=True)
        (home / "data" / "data.json").write_text("{}")
        (home / "python").write_text(STAND_IN)
        (home / "python").chmod(0o755)
        self.describe()

    def describe(self, **slurm: object) -> None:
        settings = {"partition": "main", "time": "5", "python": str(self.home / "python"), **slurm}
        description = {"nodes": 2, "ranks_per_node": 2, "cpus_per_node": 4, "slurm": settings}
        (self.home / "cluster.yaml").write_text(yaml.safe_dump(description))

    def launch(self, *arguments: str, name: str = "x") -> int:
        return launch.main(
            ["slurm", str(CONFIG), "data.path=data", f"name={name}", "--cluster", "cluster.yaml", *arguments]
        )

    def jobs(self, run_dir: Path) -> list[int]:
        return [int(entry["job_id"]) for entry in read_lines(jobs_file(run_dir))]

    def finish(self, *jobs: int) -> None:
        for job in jobs:
            self.cluster.wait_state(job, {"COMPLETED"})

    def waiting(self) -> str:
        return self.cluster.run(["squeue", "--noheader"]).stdout


@pytest.fixture
def account(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Account:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env[name])
    home = tmp_path / "home of me"
    result = Account(cluster, home)
    monkeypatch.chdir(home)
    return result


def files(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*")}


def test_dry_run_prints_and_leaves_nothing(account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(account.home)
    assert account.launch("--dry-run", "--nodes", "3", "train.global_batch_size=6", "--time", "10:00:00") == 0
    out = capsys.readouterr()
    assert out.out.startswith("#!/usr/bin/env bash\n") and "#SBATCH --time=10:00:00" in out.out
    assert "to start at" in out.err and "nothing was submitted" in out.err
    assert files(account.home) == before and account.waiting() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "nosuch"], r"slurm\.partition=nosuch is not a partition .*`sinfo`"),
        (
            ["--partition", "closed", "--account", "biology"],
            r"slurm\.account=biology is refused for slurm\.partition=closed",
        ),
        (["--set", "slurm.constraint=h100"], r"slurm\.constraint=h100 names features that no node has"),
        (["--set", "slurm.reservation=mine"], r"slurm\.reservation=mine cannot be used"),
        (["--set", "slurm.exclude=node77"], r"slurm\.exclude=node77 names nodes that do not exist"),
        (["--set", "slurm.memory=900G"], r"slurm\.partition=main can never run this: .*slurm\.memory=900G"),
        (["--set", "cpus_per_node=64"], r"slurm\.partition=main can never run this: nodes=2, cpus_per_node=64"),
        (["--set", "gpus_per_node=3"], r"can never run this: .*gpus_per_node=3"),
        (["--nodes", "4", "train.global_batch_size=8"], r"can never run this: nodes=4"),
        (["--partition", "small"], r"slurm\.partition=small can never run this"),
        (["--time", "9-00"], r"slurm\.time=9-00"),
        (["--set", "slurm.directives=[--nosuch]"], r"slurm\.directives has an option"),
        (["train.global_batch_size=6"], r"nodes=2 x ranks_per_node=2 of cluster cluster: train\.global_batch_size=6"),
        (
            ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"],
            "more than the 2 ranks of a node",
        ),
        (["--chain", "0"], "--chain is 0"),
    ],
)
def test_what_is_refused_leaves_nothing(account: Account, arguments: list[str], message: str) -> None:
    for partition in ("name=closed,nodes=ALL,allowaccounts=physics", "name=small,nodes=ALL,maxnodes=1"):
        account.cluster.run(["scontrol", "create", *f"partition{partition}".split(",")], check=False)
    before = files(account.home)
    with pytest.raises(MegamemError, match=message) as failure:
        account.launch(*arguments)
    assert "\n" not in str(failure.value)
    assert files(account.home) == before and account.waiting() == ""


def test_the_job_gets_what_was_kept_and_nothing_of_another_job(
    account: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    account.describe(environment={"GREETING": "good day; $HOME"}, setup=["export FROM_SETUP=yes"])
    theirs = {"SBATCH_PARTITION": "nosuch", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "77", "RANK": "3", "MASTER_PORT": "1"}
    for name, value in (theirs | {"HF_TOKEN": "a-secret", "MINE": "kept"}).items():
        monkeypatch.setenv(name, value)
    assert account.launch("train.steps=7", "--set", "slurm.signal_seconds=30") == 0
    run_dir = account.home / "runs" / "x"
    assert f"submitted job {account.jobs(run_dir)[0]}: {run_dir}" in capsys.readouterr().out
    account.finish(*account.jobs(run_dir))
    folder = run_dir / "launch" / "submission-1"
    arguments = (folder / "arguments").read_text().splitlines()
    assert arguments == [str(account.home), "-m", "megamem_launch.supervise", str(folder)]
    environment = dict(line.split("=", 1) for line in (folder / "env").read_text().splitlines() if "=" in line)
    assert environment["GREETING"] == "good day; $HOME" and environment["FROM_SETUP"] == "yes"
    assert environment["MINE"] == "kept" and environment["HF_TOKEN"] == "a-secret"  # the job has it, the records do not
    assert not any("a-secret" in path.read_text() for path in folder.iterdir() if path.name != "env")
    assert environment["SLURM_NNODES"] == "2" and environment["SLURM_JOB_ID"] != "1"
    assert not environment.keys() & {"RANK", "MASTER_PORT", "SBATCH_PARTITION"}
    kept = read_json(folder / "submission.json")
    assert (
        kept is not None
        and kept["world_size"] == 4
        and kept["overrides"] == ["data.path=data", "name=x", "train.steps=7"]
    )
    config = load_config(folder / "config.yaml")
    assert config.train.steps == 7 and config.run_dir == run_dir == Path(kept["run_dir"])
    assert load_cluster(folder / "cluster.yaml").slurm.signal_seconds == 30
    assert list((run_dir / "launch" / "logs").glob("slurm-*.log"))


def test_a_run_has_one_job_at_a_time_and_none_when_finished(account: Account) -> None:
    run_dir = account.home / "runs" / "x"
    (account.home / "hold").touch()
    account.launch()
    (job,) = account.jobs(run_dir)
    with pytest.raises(LaunchError, match=rf"already has jobs: {job} .*megamem launch cancel {run_dir}"):
        account.launch()
    (account.home / "hold").unlink()
    account.finish(job)
    write_json(finished_file(run_dir), {"step": 1000, "time": 0.0})
    with pytest.raises(LaunchError, match=r"has trained 1000 of train\.steps=20 steps; raise train\.steps"):
        account.launch()
    write_json(cancelled_file(run_dir), {"time": 0.0})
    with pytest.raises(LaunchError, match=r"slurm\.time=9-00"):
        account.launch("train.steps=2000", "--time", "9-00")
    assert finished_file(run_dir).exists() and cancelled_file(run_dir).exists()
    account.launch("train.steps=2000")
    assert not finished_file(run_dir).exists() and not cancelled_file(run_dir).exists()
    account.finish(account.jobs(run_dir)[-1])
    assert sorted(path.name for path in (run_dir / "launch").glob("submission-*")) == ["submission-1", "submission-2"]


def test_jobs_of_a_chain_run_one_after_another(account: Account) -> None:
    run_dir = account.home / "runs" / "x"
    account.launch("--chain", "3", "--nodes", "1")
    entries = read_lines(jobs_file(run_dir))
    jobs = [int(entry["job_id"]) for entry in entries]
    assert [entry["kind"] for entry in entries] == ["chain"] * 3
    assert [entry["after"] for entry in entries] == ["", str(jobs[0]), str(jobs[1])]
    assert f"afterany:{jobs[1]}" in account.cluster.job(jobs[2])["Dependency"]
    assert "singleton" in account.cluster.job(jobs[2])["Dependency"]
    account.finish(*jobs)
    trace = [line.split() for line in (run_dir / "launch" / "trace").read_text().splitlines()]
    assert [(word, int(job)) for word, job, _ in trace] == [(word, job) for job in jobs for word in ("begin", "end")]
    kept = read_json(run_dir / "launch" / "submission-1" / "submission.json")
    assert kept is not None and (kept["kind"], kept["chain_length"]) == ("chain", 3)


def test_the_next_of_a_chain_comes_when_one_fails(account: Account) -> None:
    (account.home / "python").write_text("#!/bin/bash\nexit 1\n")
    account.launch("--chain", "2")
    jobs = account.jobs(account.home / "runs" / "x")
    for job in jobs:
        account.cluster.wait_state(job, {"FAILED"})


def test_a_directory_that_nodes_do_not_see_is_named(account: Account) -> None:
    account.launch()
    run_dir = account.home / "runs" / "x"
    account.finish(*account.jobs(run_dir))
    script = run_dir / "launch" / "submission-1" / "script.sbatch"
    script.write_text(script.read_text().replace("/launch/logs/slurm-", "/not/here/slurm-"))
    assert launch.main(["requeue", str(run_dir)]) == 0
    account.cluster.wait_state(account.jobs(run_dir)[-1], {"FAILED"})
    status = read_status(run_dir, Slurm())
    assert status.state == "failed" and "set runs_dir to a path that all nodes share" in status.why


def test_a_chain_that_is_refused_midway_leaves_nothing(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(account.home)
    calls: list[str] = []

    def refuse_third(script: Path, cluster: Cluster, options: list[str]) -> str:
        if len(calls) == 2:
            raise LaunchError("refused")
        calls.append(submit_one(script, cluster, options))
        return calls[-1]

    submit_one = submit._submit_one
    monkeypatch.setattr(submit, "_submit_one", refuse_third)
    with pytest.raises(LaunchError, match="refused"):
        account.launch("--chain", "3")
    assert len(calls) == 2 and files(account.home) == before
    account.cluster.wait(lambda: account.waiting() == "", "an empty queue")


def test_points_of_a_sweep_are_tasks_of_one_array(account: Account) -> None:
    (account.home / "sweep.yaml").write_text("grid: {train.seed: [1, 2], optimizer.lr: [0.1, 0.2]}\nat_once: 1\n")
    account.launch("--sweep", "sweep.yaml", "--nodes", "1", name="rates")
    parent = account.home / "runs" / "rates"
    (entry,) = read_lines(jobs_file(parent))
    array = int(entry["job_id"])
    account.cluster.wait(
        lambda: account.cluster.run(["squeue", "--noheader", f"--jobs={array}"], check=False).stdout == "",
        "the array's end",
    )
    points = json.loads((parent / "launch" / "sweep.json").read_text())["points"]
    assert [point["name"] for point in points] == ["seed=1,lr=0.1", "seed=1,lr=0.2", "seed=2,lr=0.1", "seed=2,lr=0.2"]
    for number, point in enumerate(points):
        run_dir = Path(point["run_dir"])
        assert run_dir == parent / point["name"]
        folder = run_dir / "launch" / "submission-1"
        assert (folder / "arguments").read_text().splitlines()[3] == str(folder)
        config = load_config(folder / "config.yaml")
        assert (config.train.seed, config.optimizer.lr) == (
            point["settings"]["train.seed"],
            point["settings"]["optimizer.lr"],
        )
        assert config.run_dir == run_dir and config.tracking.parent == "rates"
        assert config.tracking.uri == f"sqlite:///{account.home}/runs/mlflow.db"
        assert [entry["job_id"] for entry in read_lines(jobs_file(run_dir))] == [f"{array}_{number}"]
    with pytest.raises(LaunchError, match="exists already; set another name for the sweep"):
        account.launch("--sweep", "sweep.yaml", name="rates")


def test_one_bad_point_and_nothing_is_submitted(account: Account) -> None:
    (account.home / "sweep.yaml").write_text("grid: {train.global_batch_size: [4, 6]}\n")
    before = files(account.home)
    with pytest.raises(ConfigError, match=r"point global_batch_size=6: nodes=2 .*is not a multiple"):
        account.launch("--sweep", "sweep.yaml")
    (account.home / "sweep.yaml").write_text("grid: {train.seed: [4, 6]}\n")
    with pytest.raises(LaunchError, match=r"slurm\.partition=nosuch"):
        account.launch("--sweep", "sweep.yaml", "--partition", "nosuch")
    with pytest.raises(LaunchError, match=r"slurm\.time=9-00"):
        account.launch("--sweep", "sweep.yaml", "--time", "9-00")
    assert files(account.home) == before and account.waiting() == ""


def test_nodes_that_are_down_are_waited_for(account: Account) -> None:
    for node in account.cluster.nodes:
        account.cluster.set_down(node)
    account.launch()
    (job,) = account.jobs(account.home / "runs" / "x")
    assert account.cluster.job(job)["JobState"] == "PENDING"
    for node in account.cluster.nodes:
        account.cluster.resume(node)
    account.finish(job)


def test_data_is_prepared_by_an_array(account: Account) -> None:
    (account.home / "corpus").mkdir()
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    for number in range(6):
        (account.home / "corpus" / f"{number}.txt").write_text("\n".join(lines[number::6]))
    settings = [
        *("data.sources=[{kind: folder, path: corpus}]", "data.tokenizer.vocab_size=400", "memory.bank.units=[]"),
        *("memory.bank.layers=[]", "data.workers=1"),
    ]
    account.describe(python=sys.executable, environment={"OMP_NUM_THREADS": "1"})
    arguments = ["data", str(CONFIG), "data.path=prepared", *settings, "--cluster", "cluster.yaml", "--shards", "2"]
    root = account.home / "prepared.parts"
    write_json(cancelled_file(root), {"time": 0.0})  # of an attempt before
    assert launch.main([*arguments, "--strict"]) == 0
    assert not cancelled_file(root).exists()
    jobs = account.jobs(root)
    assert len(jobs) == 3
    for job in (jobs[0], jobs[2]):  # the one between them is an array
        account.cluster.wait_state(job, {"COMPLETED"}, timeout=140)
    data = PreparedData.open(account.home / "prepared", verify=True)
    assert data.manifest.documents == 6 and data.manifest.request["strict"] is True
    assert read_status(root, Slurm()).state == "finished"
    assert [path.name for path in root.iterdir()] == ["launch"]
    with pytest.raises(LaunchError, match="exists already"):
        launch.main(arguments)
