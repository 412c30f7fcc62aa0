"""Submissions without a cluster: sentences for refusals, sweeps, what is kept, and that a failure leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megamem.errors import ConfigError, DataError, LaunchError
from megamem_launch.cluster import build_cluster, load_cluster
from megamem_launch.config import load_config
from megamem_launch.rundir import (
    jobs_file,
    launch_dir,
    next_submission_folder,
    read_json,
    read_lines,
    submission_folders,
)
from megamem_launch.slurm.capture import records
from megamem_launch.slurm.data_array import data_scripts, launch_data
from megamem_launch.slurm.refusal import explain, is_transient, lacks_nodes, waits_for_ever
from megamem_launch.slurm.shared import local_notes
from megamem_launch.slurm.submit import Submission, ask, claimed, record_job, submit, write_submission
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


def test_a_refusal_of_the_default_partition_says_so() -> None:
    cluster = build_cluster({"nodes": 9, "gpus_per_node": 8, "cpus_per_node": 8}, "x")
    text = explain("sbatch: error: Requested node configuration is not available", cluster)
    assert text.startswith("the default partition can never run this: nodes=9, cpus_per_node=8, gpus_per_node=8")


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
    alike = point_names([{"x": 1}, {"x": "1"}, {"x": 2}])
    assert len(set(alike)) == 3 and alike[2] == "x=2"
    assert len(set(names)) == 5 and all(Path(name).name == name and len(name) < 100 for name in names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {}\n", "neither grid nor points"),
        ("grid: {train.steps: 5}\n", "grid.train.steps is 5; set a list"),
        ("points: [{train.seed: 1}, {train.seed: 1}]\n", "the same point is there twice"),
        ("points: [{train.seed: 1, name: 2026-01-02}]\n", "name has 2026-01-02, which YAML reads as a date"),
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
    with pytest.raises(
        ConfigError, match=r"slurm\.time=4 is 240 s, .*only start and save; set slurm\.time to at least 5"
    ):
        check_run(config, build_cluster({"slurm": {"time": "4"}}, "x"))
    short, absent = check_run(config, build_cluster({"slurm": {"time": "6", "python": "/no/python"}}, "x"))
    assert "so 180 s are left" in short and "/no/python is no program on this machine" in absent
    config.tracking.uri = "http://me:word@host"
    with pytest.raises(ConfigError, match=r"tracking\.uri holds what looks like a secret"):
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
    folder = next_submission_folder(run_dir)
    assert folder.name == "submission-1"
    write_submission(submission(run_dir), folder, {"script.sbatch": "#!/bin/bash\n", **records(tmp_path)})
    assert next_submission_folder(run_dir).name == "submission-2"
    (launch_dir(run_dir) / "submission-10").mkdir()
    (launch_dir(run_dir) / "submission-x").mkdir()
    assert [path.name for path in submission_folders(run_dir)] == ["submission-1", "submission-10"]
    assert next_submission_folder(run_dir).name == "submission-11"
    kept = read_json(folder / "submission.json")
    assert kept is not None
    assert kept.pop("created") > 0
    assert kept == {
        "run_dir": str(run_dir),
        "kind": "run",
        "chain_length": 1,
        "world_size": 4,
        "overrides": ["name=x"],
    }
    assert load_config(folder / "config.yaml") == submission(run_dir).config
    assert load_cluster(folder / "cluster.yaml") == submission(run_dir).cluster
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("script.sbatch", "config.yaml", "cluster.yaml", "submission.json", "command.txt", "code.json", "code.diff"),
        "environment.json",
    }


def test_a_failure_leaves_what_was_there_before(tmp_path: Path) -> None:
    run_dir = tmp_path / "deep" / "runs" / "x"

    def fail() -> None:
        folder = next_submission_folder(run_dir)
        with pytest.raises(LaunchError, match="refused"), claimed(run_dir, folder):
            write_submission(submission(run_dir), folder, {})
            record_job(run_dir, "8", folder, "run", "x")
            raise LaunchError("refused")

    for _ in range(2):
        fail()
        assert list(tmp_path.iterdir()) == []
    (run_dir / "launch" / "logs").mkdir(parents=True)
    (run_dir / "journal.jsonl").write_text("")
    record_job(run_dir, "7", Path("submission-0"), "run", "x")
    fail()
    assert sorted(path.name for path in run_dir.rglob("*")) == ["jobs.jsonl", "journal.jsonl", "launch", "logs"]
    assert [line["job_id"] for line in read_lines(jobs_file(run_dir))] == ["7"]


def test_two_launches_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "x"
    folder = next_submission_folder(run_dir)  # both have chosen it
    with claimed(run_dir, folder):
        write_submission(submission(run_dir), folder, {})
        with pytest.raises(LaunchError, match="being launched from elsewhere"), claimed(run_dir, folder):
            pass
    assert (folder / "submission.json").is_file()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for SLURM's commands, which write down what they are told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        stand_in(folder, name, "echo 31" if name == "sbatch" else "true")
    return folder


def stand_in(folder: Path, name: str, does: str) -> None:
    (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/said\n{does}\n')
    (folder / name).chmod(0o755)


def said(commands: Path) -> list[str]:
    return [line.split()[0] for line in (commands / "said").read_text().splitlines()]


def test_a_job_that_was_accepted_stays_when_nothing_more_can_be_told(commands: Path) -> None:
    cluster, noted = build_cluster({}, "x"), list[tuple[str, str]]()

    def note(job_id: str, former: str) -> None:
        noted.append((job_id, former))

    stand_in(commands, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert submit([Path("s")], cluster, note) == ["31"]
    assert noted == [("31", "")] and said(commands) == ["sbatch", "squeue"]


def test_members_of_a_chain_are_held_until_all_are_recorded(commands: Path) -> None:
    stand_in(commands, "sbatch", f"wc -l < {commands}/said | tr -d ' '")  # its calls so far as ids
    order: list[int] = []
    ids = submit(
        [Path("s")] * 2,
        build_cluster({}, "x"),
        lambda _, former: order.append(len(said(commands))),
        after=["", "afterany:{}"],
    )
    assert ids == ["1", "2"] and order == [1, 2]
    lines = (commands / "said").read_text().splitlines()
    assert "--hold" in lines[0] and "--dependency=afterany:1" in lines[1] and "--hold" in lines[1]
    assert lines[2:4] == ["scontrol release 1", "scontrol release 2"]


def test_the_first_error_is_the_one_that_is_told(commands: Path) -> None:
    def fail(job_id: str, _: str) -> None:
        raise LaunchError("no space left")

    with pytest.raises(LaunchError, match=r"^no space left$"):
        submit([Path("s")], build_cluster({}, "x"), fail)
    assert said(commands)[-1] == "scancel"
    stand_in(commands, "scancel", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"^no space left; .*`scancel 31` does"):
        submit([Path("s")], build_cluster({}, "x"), fail)


def test_directories_of_one_machine_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (note,) = local_notes("runs_dir", Path("/tmp/me/runs"))
    assert note.startswith("/tmp/me/runs looks like") and "set runs_dir to a path that all nodes share" in note
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint="/fast", fstype="tmpfs")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    assert local_notes("runs_dir", Path("/fast/runs")) and not local_notes("runs_dir", Path("/fastest/runs"))


def test_a_run_that_never_started_can_be_submitted_by_its_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "x"
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(tmp_path)
    write_submission(submission(run_dir), next_submission_folder(run_dir), {})
    assert load_config(run_dir).name == "x"


def test_data_is_checked_before_a_job_exists(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    settings = ["base=tiny", f"data.path={tmp_path}/data", "data.sources=[{kind: folder, path: " + str(tmp_path) + "}]"]
    config = load_config(None, settings)
    with pytest.raises(ConfigError, match=r"--shards is 2, but .* have 1 .*set at most 1"):
        launch_data(config, (), build_cluster({}, "x"), shards=2)
    config.data.sources[0].path = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.sources\[0\]: no file matches"):
        launch_data(config, (), build_cluster({}, "x"), shards=1)
    config.data.sources[0].options["token"] = "abc"
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.options\.token holds what looks like a secret"):
        launch_data(config, (), build_cluster({}, "x"), shards=1)
    scripts = data_scripts(config, build_cluster({}, "x"), tmp_path, tmp_path / "s", 2, strict=True)
    assert all("--strict" in script.command for script in scripts.values())
    assert scripts["shards"].command[-1] == "--shard"


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
