"""The description of a cluster, and how the groups of a layout fall on its nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamem.config.describe import settings
from megamem.errors import ConfigError
from megamem_launch.cluster import Cluster, build_cluster, load_cluster, save_cluster, with_mounts
from megamem_launch.config import load_config
from megamem_launch.slurm.container import container_prefix, container_srun_options, container_variables, rank_python
from megamem_launch.slurm.topology import check_topology
from megamem_launch.validate import validate

CLUSTERS = Path(__file__).parents[3] / "configs" / "clusters"


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_descriptions_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.name == path.stem and cluster.world_size >= 1
    save_cluster(cluster, tmp_path / "cluster.yaml")
    assert load_cluster(tmp_path / "cluster.yaml") == cluster


def test_every_setting_is_documented() -> None:
    assert [setting.name for setting in settings(Cluster) if not setting.text] == []


def test_ranks_are_those_of_the_gpus_where_nothing_else_is_said() -> None:
    assert build_cluster({"nodes": 3, "gpus_per_node": 8, "cpus_per_node": 96}, "x").world_size == 24
    cluster = build_cluster({"nodes": 2, "ranks_per_node": 4, "cpus_per_node": 9}, "x")
    assert cluster.world_size == 8
    assert build_cluster({}, "x").world_size == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nodes": 0}, "x: nodes is 0; set it to at least 1"),
        ({"gpus_per_node": 2, "ranks_per_node": 3, "cpus_per_node": 8}, "a GPU takes one rank"),
        ({"ranks_per_node": 4}, "cpus_per_node=1; set at least one core for each rank"),
        ({"slurm": {"time": 36000}}, "slurm.time must stand in quotes"),
        ({"slurm": {"time": "tomorrow"}}, "slurm: time is 'tomorrow'; set minutes"),
        ({"slurm": {"memory": "much"}}, "memory is 'much'"),
        ({"slurm": {"partiton": "gpu"}}, "unknown setting `slurm.partiton`: did you mean `partition`"),
        ({"slurm": {"mode": "mpirun"}}, "slurm.mode is 'mpirun'; set one of: torchrun, srun"),
        ({"slurm": {"account": "a\n#SBATCH --uid=0"}}, "set one line"),
        ({"slurm": {"directives": ["--signal=B:USR2@5"]}}, "use slurm.signal and slurm.signal_seconds"),
        ({"slurm": {"directives": ["--gres=gpu:h100:8"]}}, "use gpus_per_node"),
        ({"slurm": {"directives": ["--part gpu"]}}, "which the launcher writes itself; use slurm.partition"),
        ({"slurm": {"signal": "TERM"}}, "slurm.signal is 'TERM'; set one of: USR1, USR2"),
        ({"slurm": {"setup": ["export HF_TOKEN=abcdefgh"]}}, "setup has what looks like a secret"),
        ({"slurm": {"directives": ["--comment=ghp_" + "a" * 36]}}, "directives has what looks like a secret"),
        (
            {"slurm": {"container": {"kind": "apptainer", "image": "i", "options": ["--env=HF_TOKEN=abcdefgh"]}}},
            "image and options has what looks like a secret",
        ),
        ({"slurm": {"directives": ["-N4"]}}, "set long options of sbatch"),
        ({"slurm": {"environment": {"A B": "1"}}}, "set names of variables"),
        ({"slurm": {"environment": {"WANDB_API_KEY": "abc"}}}, "looks like a secret"),
        ({"slurm": {"environment": {"URI": "http://me:word@host"}}}, "environment.URI looks like a secret"),
        ({"slurm": {"container": {"kind": "pyxis"}}}, "slurm.container: kind is pyxis and image is ''"),
        ({"slurm": {"container": {"kind": "pyxis", "image": "i", "mounts": ["a,b"]}}}, "mounts has 'a,b'"),
    ],
)
def test_bad_descriptions_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build_cluster(data, "x")


def test_what_the_launcher_leaves_to_the_site() -> None:
    directives = ["--mail-type=FAIL", "--nodelist=n1", "--time-min=5", "--gpu-freq=low", "--switches=1"]
    setup = ["export HF_TOKEN=$(cat ~/.token)", 'export MY_PASSWORD="${OTHER}"', "module load cuda"]
    build_cluster({"slurm": {"directives": directives, "setup": setup}}, "x")


def test_missing_file_and_overrides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cluster description at"):
        load_cluster(tmp_path / "nowhere.yaml")
    (tmp_path / "c.yaml").write_text("slurm: {partition: a, memory: 0}\n")
    cluster = load_cluster(tmp_path / "c.yaml", ["slurm.partition=b", "slurm.time='10:00:00'", "nodes=3"])
    assert (cluster.slurm.partition, cluster.slurm.time, cluster.slurm.memory, cluster.nodes) == (
        "b",
        "10:00:00",
        "0",
        3,
    )


def test_errors_name_the_option_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"c\.yaml is empty"):
        load_cluster(path)
    path.write_text("nodes: 2\n")
    with pytest.raises(ConfigError, match=r"^--time noon: slurm: time is 'noon'"):
        load_cluster(path, ["nodes=3", "slurm.time=noon"], ["--nodes 3", "--time noon"])
    with pytest.raises(ConfigError, match=r"^nodes=0: nodes is 0"):
        load_cluster(path, ["nodes=0"])
    path.write_text("nodes: 0\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: nodes is 0"):
        load_cluster(path, ["slurm.requeue=false"])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("", None),
        ("UNLIMITED", None),
        ("90", 5400),
        ("5:30", 330),
        ("1:00:10", 3610),
        ("1-02", 93600),
        ("2-0:30", 174600),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int | None) -> None:
    assert build_cluster({"slurm": {"time": time}}, "x").time_seconds == seconds


def test_containers_see_what_the_run_needs() -> None:
    data = {"gpus_per_node": 1, "slurm": {"container": {"image": "i.sqsh", "mounts": ["/data", "/a:/b:ro"]}}}
    for kind in ("pyxis", "apptainer"):
        data["slurm"]["container"] |= {"kind": kind, "environment": ["HF_HOME"], "options": ["--option"]}  # type: ignore[index]
        cluster = with_mounts(
            build_cluster(data, "x"), Path("/home/me"), [Path("/data/x"), Path("/a")], [Path("/home/me/runs")]
        )
        assert cluster.slurm.container.mounts == ["/data", "/a:/b:ro", "/home/me", "/a"]
        if kind == "pyxis":
            assert container_srun_options(cluster) == [
                "--container-image=i.sqsh",
                "--container-mounts=/data:/data,/a:/b:ro,/home/me:/home/me,/a:/a",
                "--container-workdir=/home/me",
                "--container-env=HF_HOME",
                "--option",
            ]
            assert container_prefix(cluster) == [] and container_variables(cluster) == {}
        else:
            assert container_srun_options(cluster) == []
            binds = [
                part
                for mount in ("/data:/data", "/a:/b:ro", "/home/me:/home/me", "/a:/a")
                for part in ("--bind", mount)
            ]
            expected = ["apptainer", "exec", "--nv", *binds, "--pwd", "/home/me", "--option", "i.sqsh"]
            assert container_prefix(cluster) == expected
            assert container_variables(cluster) == {"APPTAINERENV_HF_HOME": "HF_HOME"}
        assert rank_python(cluster, "/venv/python") == "python"
    assert rank_python(build_cluster({}, "x"), "/venv/python") == "/venv/python"


def test_what_is_written_needs_a_mount_that_is_not_read_only() -> None:
    container = {"kind": "pyxis", "image": "i", "mounts": ["/data:/data:ro", "/runs:/runs:ro", "/scratch"]}
    cluster = with_mounts(
        build_cluster({"slurm": {"container": container}}, "x"),
        Path("/scratch/me"),
        [Path("/data/x")],
        [Path("/runs"), Path("/scratch/disk")],
    )
    assert cluster.slurm.container.mounts == [*container["mounts"], "/runs"]


def notes(ranks_per_node: int, nodes: int, *overrides: str) -> list[str]:
    config = load_config(None, ["base=tiny", "train.global_batch_size=48", *overrides])
    cluster = build_cluster({"nodes": nodes, "ranks_per_node": ranks_per_node, "cpus_per_node": 8}, "x")
    return check_topology(config, validate(config, cluster.world_size), cluster)


TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
TP4 = ("parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true")


def test_groups_that_cross_nodes_are_refused_or_told() -> None:
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=4 is more than the 2 ranks of a node"):
        notes(2, 2, *TP4)
    with pytest.raises(ConfigError, match=r"does not divide the 3 ranks of a node.*divisor of 3"):
        notes(3, 4, *TP2)
    assert notes(4, 2, *TP2) == []  # a memory group takes two whole nodes
    assert notes(4, 2, *TP2, "parallel.pipeline_model_parallel_size=2") == []  # or lies within one
    assert notes(2, 1, *TP2) == []
    (note,) = notes(2, 2, "parallel.context_parallel_size=4", "data.seq_length=64", "memory.engram.conv_kernel_size=2")
    assert note.startswith("context-parallel groups of 4 ranks")
    (note,) = notes(2, 2, "parallel.expert_model_parallel_size=4")
    assert note.startswith("expert-parallel groups of 4 ranks cross nodes of 2")


def test_memory_groups_that_are_not_whole_nodes() -> None:
    layout = ("parallel.pipeline_model_parallel_size=2",)
    (note,) = notes(4, 3, *layout)  # stages of 6 ranks on nodes of 4
    assert note.startswith("memory groups of 6 ranks (a pipeline stage) are not whole nodes of 4")
    with pytest.raises(ConfigError, match=r"memory\.hierarchical is on, but the 6 ranks"):
        notes(4, 3, *layout, "memory.hierarchical=on")
    assert notes(4, 2, "memory.hierarchical=on") == []
    with pytest.raises(ConfigError, match=r"memory\.hierarchical is on, but the 4 ranks"):
        notes(4, 2, *layout, "memory.hierarchical=on")
