"""Running SLURM's commands: what stands in for them here prints what they print."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megamem.errors import LaunchError
from megamem_launch.slurm.client import SchedulerRefusal, SchedulerUnavailable, run
from megamem_launch.slurm.history import accounted, accounted_state
from megamem_launch.slurm.scheduler import Slurm


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of commands, before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def write(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_an_absent_controller_is_no_answer(command: Path) -> None:
    write(
        command / "squeue",
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
    )
    with pytest.raises(SchedulerUnavailable, match="try again later"):
        Slurm().jobs(["1"])
    write(command / "scontrol", "exec sleep 5")
    with pytest.raises(SchedulerUnavailable, match="within 0 s"):
        run("scontrol", "show", "job", "1", timeout=0.2)


def test_a_forgotten_job_is_none(command: Path) -> None:
    write(command / "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    write(command / "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert Slurm().job("9") is None
    assert Slurm().jobs(["9"]) == []
    assert Slurm().jobs([]) == []
    with pytest.raises(SchedulerRefusal) as refusal:
        Slurm().requeue("9")
    assert refusal.value.complaint == "Invalid job id specified"


def test_personal_settings_do_not_change_answers(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_USERS", "nobody")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_CONF", "/here")
    write(command / "sinfo", 'echo "[$SQUEUE_USERS] $SLURM_TIME_FORMAT $LC_ALL $SLURM_CONF"')
    assert run("sinfo").strip() == "[] %s C /here"


def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="login node"):
        Slurm().jobs(["1"])
    assert accounted("1") == [] and accounted_state("1") == ""


def test_accounts_are_optional(command: Path) -> None:
    write(command / "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert accounted("7") == [] and accounted_state("7") == ""
    write(
        command / "sacct",
        "echo '7|REQUEUED|1|62|61||0:0|n1'; echo '7.batch|CANCELLED|1|62|61|2048K|0:15|n1'; echo '7.0|FAILED|1|62|60|9M|0:0|n1';"
        "echo '7|TIMEOUT|90|99|9||0:0|n2'",
    )
    assert accounted("7") == [(61.0, 9.0), (9.0, None)]
    assert accounted_state("7") == "TIMEOUT"


def test_nodes_that_the_cluster_does_not_have_are_left_out(command: Path) -> None:
    write(
        command / "scontrol",
        'case "$3" in a) echo "NodeName=a Arch=x86_64\n   NodeAddr=10.0.0.1 NodeHostName=a\n   State=IDLE ThreadsPerCore=1";;'
        ' *) echo "Node b not found" >&2; exit 1;; esac',
    )
    assert {name: node.address for name, node in Slurm().nodes(["a", "b"]).items()} == {"a": "10.0.0.1"}
    assert Slurm().node("b") is None


def test_signals_go_to_the_batch_script_where_asked(command: Path) -> None:
    log = command / "said"
    write(command / "scancel", f'echo "$@" >> {log}')
    slurm = Slurm()
    slurm.signal("7", "SIGUSR1", batch=True)
    slurm.signal("7.0", "USR2")
    slurm.cancel(["7", "8"])
    slurm.cancel([])
    assert log.read_text().splitlines() == ["--batch --signal=USR1 7", "--signal=USR2 7.0", "--quiet 7 8"]
