"""Batch scripts: those in slurm/ are what the launcher renders, they parse, and what users write is quoted."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megamem.errors import ConfigError
from megamem_launch.cluster import build_cluster
from megamem_launch.slurm.render import Script, render
from megamem_launch.slurm.samples import samples
from megamem_launch.slurm.training import training_script

FOLDER = Path(__file__).parents[3] / "slurm"


def test_the_scripts_in_the_repository_are_what_is_rendered() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.sbatch")}
    assert found == samples(), "run `python -m megamem_launch.slurm.samples slurm`"


@pytest.mark.parametrize("name", sorted(samples()))
def test_scripts_parse(name: str) -> None:
    result = subprocess.run(["bash", "-n", FOLDER / name], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    command = ["shellcheck", "--norc", "--severity=style", *sorted(FOLDER.glob("*.sbatch"))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def rendered(
    slurm: dict[str, object], folders: list[Path] | None = None, at_once: int = 0, **data: object
) -> list[str]:
    cluster = build_cluster({"nodes": 2, "cpus_per_node": 8, "slurm": slurm, **data}, "x")
    return render(cluster, training_script(cluster, Path("/r/x"), folders or [Path("/r/x/s")], at_once)).splitlines()


def test_directives_follow_the_description() -> None:
    lines = rendered({}, gpus_per_node=4)
    assert lines[0] == "#!/usr/bin/env bash"
    for expected in (
        *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--gres=gpu:4", "--signal=B:USR1@120"),
        *("--requeue", "--exclusive", "--open-mode=append", "--export=ALL"),
        "--output=/r/x/launch/logs/slurm-%j.log",
    ):
        assert f"#SBATCH {expected}" in lines
    assert not any(word in line for line in lines for word in ("partition", "--time", "--mem", "--account", "--array"))
    full = {
        **{
            "partition": "p",
            "account": "a",
            "qos": "q",
            "time": "1-00",
            "memory": "10G",
            "constraint": "c&d",
            "exclude": "n[1-2]",
        },
        **{
            "reservation": "r",
            "mode": "srun",
            "signal": "USR2",
            "signal_seconds": 60,
            "requeue": False,
            "exclusive": False,
        },
        "directives": ["--mail-type=FAIL"],
    }
    lines = rendered(full, gpus_per_node=4)
    for expected in (
        *(
            "--partition=p",
            "--account=a",
            "--qos=q",
            "--time=1-00",
            "--mem=10G",
            "--constraint=c&d",
            "--exclude=n[1-2]",
        ),
        *("--reservation=r", "--ntasks-per-node=4", "--cpus-per-task=2", "--signal=B:USR2@60", "--no-requeue"),
        "--mail-type=FAIL",
    ):
        assert f"#SBATCH {expected}" in lines
    assert "#SBATCH --exclusive" not in lines
    lines = rendered({"signal_seconds": 0})
    assert not any("--signal" in line for line in lines)
    assert any(line.startswith("trap '' USR1") for line in lines)  # `megamem launch requeue` sends it too


def test_no_directive_stands_after_a_command() -> None:
    lines = rendered({"setup": ["echo hello"]})
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    first = min(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert last < first and lines.index("set -eo pipefail") < lines.index("echo hello")
    assert lines[-1].startswith("exec ") and lines[-1].endswith("-m megamem_launch.supervise /r/x/s")


def test_hostile_text_reaches_the_job_as_it_is(tmp_path: Path) -> None:
    value = "a b'c\"d$HOME`id`\\ #e"
    cluster = build_cluster({"slurm": {"environment": {"MINE": value}, "setup": ["unset NEVER", "X=$NEVER"]}}, "x")
    script = Script(name="x", comment=("c",), workdir=tmp_path, logs=tmp_path, command=("printenv", "MINE"))
    text = render(cluster, script)
    assert subprocess.run(["bash"], input=text, capture_output=True, text=True, check=True).stdout == value + "\n"


def test_every_task_of_an_array_gets_its_own_argument(tmp_path: Path) -> None:
    cluster = build_cluster({}, "x")
    tasks = ("one", "two $HOME", "thr'ee")
    script = Script(
        name="x", comment=(), workdir=tmp_path, logs=tmp_path, command=("printf", "<%s>"), tasks=tasks, at_once=2
    )
    text = render(cluster, script)
    assert "#SBATCH --array=0-2%2" in text and "/slurm-%A_%a.log" in text
    for number, task in enumerate(tasks):
        done = subprocess.run(
            ["bash"], input=text, env={"SLURM_ARRAY_TASK_ID": str(number)}, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"<{task}>"


def test_paths_that_directives_cannot_hold(tmp_path: Path) -> None:
    cluster = build_cluster({}, "x")

    def text(logs: Path) -> str:
        return render(cluster, Script(name="x", comment=(), workdir=tmp_path, logs=logs, command=("true",)))

    assert "#SBATCH --output='/a b/100%%/slurm-%j.log'" in text(Path("/a b/100%"))
    with pytest.raises(ConfigError, match="cannot stand in a batch script"):
        text(Path("/a\nb"))
    with pytest.raises(ConfigError, match="cannot stand in a batch script"):
        text(Path("/a'b"))


def test_variables_reach_apptainer_without_their_values(tmp_path: Path) -> None:
    container = {"kind": "apptainer", "image": "i.sif", "environment": ["MINE"]}
    cluster = build_cluster({"slurm": {"container": container}}, "x")
    script = Script(name="x", comment=(), workdir=tmp_path, logs=tmp_path, command=("printenv", "APPTAINERENV_MINE"))
    done = subprocess.run(
        ["bash"], input=render(cluster, script), env={"MINE": "a b"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "a b\n"
