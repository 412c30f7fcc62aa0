"""Submissions without a cluster: sentences for refusals, sweeps, what is kept, and that a failure leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamem.errors import ConfigError, DataError, LaunchError
from megamem_launch.cluster import build_cluster, load_cluster
from megamem_launch.config import load_config
from megamem_launch.rundir import read_json
from megamem_launch.slurm.capture import records
from megamem_launch.slurm.refusal import explain, is_transient, lacks_nodes, waits_for_ever
from megamem_launch.slurm.submit import Submission, ask, next_folder, undone_on_failure, write_submission
from megamem_launch.slurm.sweep import Sweep, point_names, read_sweep
from megamem_launch.slurm.training import check_run, job_name
from megamem_launch.verbs.launch_slurm import SlurmArguments
from megamem_launch.verbs.parse import flags_last


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "sbatch: error: invalid partition specified: gpu\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified",
            "slurm.partition=gpu is not a partition",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "slurm.account=physics is refused for slurm.partition=gpu",
        ),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "slurm.qos=long is refused"),
        ("allocation failure: Invalid feature specification", "slurm.constraint=h100 names features that no node has"),
        (
            "sbatch: error: Batch job submission failed: Requested node configuration is not available",
            "can never run this: nodes=9",
        ),
        ("sbatch: error: Memory specification can not be satisfied", "slurm.memory=(the default) cannot be had"),
        (
            "sbatch: error: Batch job submission failed: Invalid generic resource (gres) specification",
            "gpus_per_node=8 is not",
        ),
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "slurm.time=2-00 is more than",
        ),
        (
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
            "and/or time limits)",
            "a limit of your account or QOS is reached",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "does not answer",
        ),
        ("Job's account not known, so it can't use this partition (gpu allows a)", "slurm.account=physics is refused"),
        ("PartitionTimeLimit", "slurm.time=2-00 is more than"),
        ("sbatch: error: Something new", "SLURM refused the job: Something new"),
    ],
)
def test_refusals_name_the_setting(said: str, sentence: str) -> None:
    slurm = {"partition": "gpu", "account": "physics", "qos": "long", "constraint": "h100", "time": "2-00"}
    cluster = build_cluster({"nodes": 9, "gpus_per_node": 8, "cpus_per_node": 8, "slurm": slurm}, "x")
    text = explain(said, cluster)
    assert sentence in text and "\n" not in text


def test_what_waiting_cures() -> None:
    assert is_transient("allocation failure: Required node not available (down, drained or reserved)")
    assert not is_transient("allocation failure: Invalid feature specification")
    assert lacks_nodes("allocation failure: Requested node configuration is not available")
    assert all(
        map(waits_for_ever, ("PartitionConfig", "PartitionTimeLimit", "BadConstraints", "InvalidQOS", "QOSNotAllowed"))
    )
    assert not any(
        map(waits_for_ever, ("Resources", "Priority", "ReqNodeNotAvail, UnavailableNodes:n1", "Dependency", ""))
    )


def test_points_of_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "grid:\n  optimizer.lr: [1.0e-3, 3.0e-4]\n  memory: {engram.width: [8, 16]}\n"
        "points:\n  - {optimizer.lr: 0.1, train.seed: 3}\n"
    )
    points = read_sweep(file).all_points()
    assert points[0] == {"optimizer.lr": 0.001, "memory.engram.width": 8}
    assert len(points) == 5 and points[4] == {"optimizer.lr": 0.1, "train.seed": 3}
    assert point_names(points) == [
        "lr=0.001,width=8",
        "lr=0.001,width=16",
        "lr=0.0003,width=8",
        "lr=0.0003,width=16",
        "lr=0.1,seed=3",
    ]


def test_names_of_points_tell_them_apart() -> None:
    ambiguous = [{"memory.engram.width": 1, "model.width": 2}]
    assert point_names(ambiguous) == ["memory.engram.width=1,model.width=2"]
    odd: list[dict[str, Any]] = [
        {"data.path": "a/b"},
        {"data.path": "a-b"},
        {"x": [1, 2]},
        {"x": "y" * 200},
        {"x": "y" * 201},
    ]
    names = point_names(odd)
    assert len(set(names)) == 5 and all(Path(name).name == name and len(name) < 100 for name in names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {}\n", "neither grid nor points"),
        ("grid: {train.steps: 5}\n", "grid.train.steps is 5; set a list"),
        ("points: [{train.seed: 1}, {train.seed: 1}]\n", "the same point is there twice"),
        ("grd: {train.steps: [5]}\n", "unknown setting `grd`"),
        ("grid: {train.steps: [5]}\nat_once: -1\n", "at_once is -1"),
    ],
)
def test_bad_sweeps(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sweep(tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match="no sweep at"):
        read_sweep(tmp_path / "nowhere.yaml")
    assert Sweep(points=[{"a": 1}]).all_points() == [{"a": 1}]


def test_a_run_is_checked_before_a_job_exists(tmp_path: Path) -> None:
    cluster = build_cluster({"nodes": 3, "ranks_per_node": 1}, "x")
    config = load_config(None, ["base=tiny", f"data.path={tmp_path}"])
    with pytest.raises(ConfigError, match=r"nodes=3 x ranks_per_node=1 of cluster cluster: train\.global_batch_size"):
        check_run(config, cluster)
    with pytest.raises(DataError, match="holds no prepared data; run `megamem data prepare` or `megamem launch data`"):
        check_run(config, build_cluster({}, "x"))
    (tmp_path / "data.json").write_text("{}")
    assert check_run(config, build_cluster({}, "x")) == []
    config.tracking.uri = "http://me:word@host"
    with pytest.raises(ConfigError, match=r"tracking\.uri holds a password"):
        check_run(config, build_cluster({}, "x"))


def submission(run_dir: Path) -> Submission:
    return Submission(
        run_dir=run_dir,
        config=load_config(None, ["base=tiny", "name=x"]),
        cluster=build_cluster({"nodes": 2, "ranks_per_node": 2, "cpus_per_node": 2}, "x"),
        kind="run",
        world_size=4,
        overrides=("name=x",),
    )


def test_what_is_kept_can_be_read_back(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "x"
    folder = next_folder(run_dir)
    assert folder.name == "submission-1"
    write_submission(submission(run_dir), folder, {"script.sbatch": "#!/bin/bash\n", **records(tmp_path)})
    assert next_folder(run_dir).name == "submission-2"
    kept = read_json(folder / "submission.json")
    assert kept is not None
    expected = {
        "run_dir": str(run_dir),
        "world_size": 4,
        "ranks_per_node": 2,
        "nodes": 2,
        "kind": "run",
        "mode": "torchrun",
    }
    assert {name: kept[name] for name in expected} == expected and kept["overrides"] == ["name=x"]
    assert load_config(kept["config"]) == submission(run_dir).config
    assert load_cluster(kept["cluster"]) == submission(run_dir).cluster
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("script.sbatch", "config.yaml", "cluster.yaml", "submission.json", "command.txt", "code.json", "code.diff"),
        "environment.json",
    }


def test_a_failure_leaves_what_was_there_before(tmp_path: Path) -> None:
    run_dir = tmp_path / "deep" / "runs" / "x"
    for _ in range(2):
        with pytest.raises(LaunchError), undone_on_failure(run_dir, next_folder(run_dir)):
            write_submission(submission(run_dir), next_folder(run_dir), {})
            raise LaunchError("refused")
        assert list(tmp_path.iterdir()) == []
    (run_dir / "launch" / "logs").mkdir(parents=True)
    (run_dir / "journal.jsonl").write_text("")
    with pytest.raises(LaunchError), undone_on_failure(run_dir, next_folder(run_dir)):
        write_submission(submission(run_dir), next_folder(run_dir), {})
        raise LaunchError("refused")
    assert sorted(path.name for path in run_dir.rglob("*")) == ["journal.jsonl", "launch", "logs"]


def test_job_names_tell_runs_of_one_name_apart() -> None:
    assert job_name(Path("/a/x")).startswith("x-") and job_name(Path("/a/x")) != job_name(Path("/b/x"))


def test_settings_may_stand_on_either_side_of_flags() -> None:
    argv = ["c.yaml", "--cluster", "f.yaml", "a.b=1", "--dry-run", "c.d=2", "--set", "slurm.x=y", "--time=5", "e=3"]
    found = flags_last(SlurmArguments, argv)
    assert found == [
        "c.yaml",
        "a.b=1",
        "c.d=2",
        "e=3",
        "--cluster",
        "f.yaml",
        "--dry-run",
        "--set",
        "slurm.x=y",
        "--time=5",
    ]


def test_submitting_needs_no_heavy_library() -> None:
    code = (
        "import sys, megamem_launch.verbs.launch, megamem_launch.verbs.launch_slurm; "
        "loaded = {'torch', 'numba', 'mlflow', 'megatron', 'transformers'} & set(sys.modules); assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_without_slurm_the_sentence_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"no sbatch here; run this on a login node .* `megamem launch local`"):
        ask("#!/bin/bash\n", build_cluster({}, "x"))
