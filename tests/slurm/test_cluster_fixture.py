"""The SLURM that the other tests of this folder rely on: does it start fast, break as asked, and leave nothing?"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamem.testing.slurm_cluster import ClusterError, SlurmCluster, missing_packages, nodes, packages, processes

ROOT = Path(__file__).parents[2]
SLEEPER = 'echo "restart ${SLURM_RESTART_COUNT:-0}"; [ -n "$SLURM_RESTART_COUNT" ] || srun sleep 100'


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short path that anybody may use."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def test_tasks_run_across_nodes_with_their_own_gpus(cluster: SlurmCluster) -> None:
    print(f"three nodes were idle {cluster.start_seconds:.2f} s after the start")
    assert cluster.start_seconds < 10
    task = "echo $SLURMD_NODENAME $SLURM_PROCID $CUDA_VISIBLE_DEVICES"
    printed = cluster.run(
        ["srun", "-N2", "-n4", "--nodelist=node[1-2]", "--gpus-per-task=1", "bash", "-c", task]
    ).stdout.split("\n")
    # Which of a node's two tasks gets which GPU is SLURM's business.
    assert sorted(line.split()[1] for line in printed if line) == ["0", "1", "2", "3"]
    assert sorted((line.split()[0], line.split()[2]) for line in printed if line) == [
        (node, gpu) for node in ("node1", "node2") for gpu in ("0", "1")
    ]
    with pytest.raises(ClusterError, match=r"Requested node configuration is not available|Invalid generic resource"):
        cluster.run(["srun", "--gres=gpu:3", "true"])


def test_nodes_have_names_that_resolve(cluster: SlurmCluster) -> None:
    if not cluster.settings.isolated:
        pytest.skip("this kernel or user allows no namespaces")
    printed = cluster.run(
        ["srun", "-N2", "--nodelist=node[1-2]", "bash", "-c", "hostname; getent hosts node1 node2"]
    ).stdout
    assert printed.count("node1") == printed.count("node2") == 3


def test_requeued_job_restarts_when_released(cluster: SlurmCluster) -> None:
    job = cluster.sbatch(SLEEPER, "--nodes=2")
    cluster.wait(lambda: len([p for p in cluster.job_processes() if p.name == "sleep"]) == 2, "both tasks")
    cluster.run(["scontrol", "requeue", str(job)])
    cluster.release(job)
    assert cluster.wait_state(job, {"COMPLETED"})["Restarts"] == "1"
    assert "restart 1" in cluster.output(job)


def test_preempted_job_is_warned_and_requeued(cluster: SlurmCluster) -> None:
    trap = "trap 'echo warned; exit 0' USR1; echo up; while :; do sleep 0.1; done"
    low = cluster.sbatch(trap, "--partition=low", "--nodes=3", "--exclusive", "--signal=B:USR1@60")
    cluster.wait(lambda: "up" in cluster.output(low), "the low job")
    high = cluster.sbatch("true", "--partition=high", "--nodes=3", "--exclusive")
    cluster.wait_state(high, {"COMPLETED"})
    assert "warned" in cluster.output(low)
    print(f"the low job, which ended with 0 when it was warned: {cluster.job(low)['JobState']}")


def test_power_loss_requeues_onto_what_is_left(cluster: SlurmCluster) -> None:
    job = cluster.sbatch(SLEEPER, "--nodes=1")
    cluster.wait(lambda: any(p.name == "sleep" for p in cluster.job_processes()), "the task")
    lost = cluster.job(job)["NodeList"]
    cluster.kill_node(lost)
    assert cluster.node_processes(lost) == []
    cluster.set_down(lost)
    cluster.release(job)
    assert cluster.wait_state(job, {"COMPLETED"})["NodeList"] != lost
    assert "restart 1" in cluster.output(job)
    cluster.start_node(lost)
    assert cluster.node_state(lost).startswith("DOWN"), "what an administrator set down stays down"
    cluster.resume(lost)
    cluster.wait(lambda: cluster.node_state(lost) == "IDLE", lost)


def test_lost_slurmd_that_comes_back_leaves_its_job_alone(cluster: SlurmCluster, folder: Path) -> None:
    job = cluster.sbatch(f"until [ -e {folder}/go ]; do sleep 0.1; done; echo done", "--nodes=1")
    cluster.wait(lambda: any(p.name == "sleep" for p in cluster.job_processes()), "the job")
    node = cluster.job(job)["NodeList"]
    cluster.kill_slurmd(node)
    cluster.wait(lambda: any(p.name == "sleep" for p in cluster.node_processes(node)), "the job without its daemon")
    cluster.start_node(node)
    (folder / "go").touch()
    assert cluster.wait_state(job, {"COMPLETED"}).get("Restarts") == "0"
    assert cluster.output(job) == "done\n"


def test_two_clusters_side_by_side(cluster: SlurmCluster, folder: Path) -> None:
    with SlurmCluster.start(folder / "b", nodes=1, gpus=0, isolate="none") as other:
        first, second = cluster.sbatch("echo one"), other.sbatch("echo two")
        cluster.wait_state(first, {"COMPLETED"})
        other.wait_state(second, {"COMPLETED"})
        assert (cluster.output(first), other.output(second)) == ("one\n", "two\n")
        assert not {p.pid for p in cluster.processes()} & {p.pid for p in other.processes()}
    assert other.processes() == []
    assert cluster.run(["srun", "echo", "alive"]).stdout == "alive\n"


def test_auto_does_without_namespaces_where_there_are_none(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nodes, "_INIT_SCRIPT", "echo no >&2; exit 1")
    with pytest.raises(OSError, match="no namespaces for node1: no"):
        SlurmCluster.start(folder / "a", isolate="namespaces")
    assert processes.find(folder / "a") == []
    with SlurmCluster.start(folder / "b") as other:
        assert not other.settings.isolated
        job = other.sbatch("setsid sleep 1000 & sleep 1000", "--nodes=1")
        other.wait(lambda: len(other.job_processes()) >= 3, "the job")
        node = other.job(job)["NodeList"]
        other.kill_node(node)
        assert other.node_processes(node) == []
        other.reset()
        assert other.job(job)["JobState"] == "CANCELLED"


def test_commands_for_people(folder: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        parts = [sys.executable, "-m", "megamem.testing.slurm_cluster", *arguments]
        return subprocess.run(parts, cwd=ROOT, capture_output=True, text=True, check=False)

    directory = folder / "c"
    started = command("start", str(directory), "--nodes", "1", "--gpus", "1")
    try:
        assert f"export SLURM_CONF={directory}/etc/slurm.conf" in started.stdout, started.stderr
        assert "has the files of a cluster already" in command("start", str(directory)).stderr
        assert command("kill-node", str(directory), "node1").returncode == 0
        attached = SlurmCluster.attach(directory)
        assert attached.node_processes("node1") == []
        assert command("start-node", str(directory), "node1").returncode == 0
        assert attached.run(["srun", "--gres=gpu:1", "printenv", "CUDA_VISIBLE_DEVICES"]).stdout == "0\n"
    finally:
        assert command("stop", str(directory)).returncode == 0
    assert processes.find(directory) == []


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(packages, "search_path", lambda: str(folder))
    assert missing_packages() == ["slurmctld", "slurmd", "slurm-client", "munge"]
    with pytest.raises(FileNotFoundError, match="install the Debian packages slurmctld slurmd slurm-client munge"):
        SlurmCluster.start(folder / "c")


@pytest.mark.parametrize("isolate", ["auto", "none"])
def test_nothing_outlives_an_owner_that_is_killed(isolate: str, folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from megamem.testing.slurm_cluster import SlurmCluster\n"
        f"c = SlurmCluster.start(Path({str(folder)!r}), isolate={isolate!r})\n"
        "c.sbatch('setsid sleep 1000 & srun -N2 sleep 1000', '--nodes=2')\n"
        "c.wait(lambda: len(c.job_processes()) >= 4, 'the job'); print('up', flush=True); time.sleep(1000)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    assert len(processes.find(folder)) >= 10
    os.killpg(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while left := processes.find(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_ordinary_user_starts_one(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("not root: the other tests are run by an ordinary user already")
    python = shutil.which("python3", path="/usr/bin:/bin")
    program = (
        "from pathlib import Path; from megamem.testing.slurm_cluster import SlurmCluster\n"
        f"with SlurmCluster.start(Path({str(folder / 'c')!r})) as c:\n"
        "    print(c.run(['srun', '-N2', 'id', '-un']).stdout.split(), c.settings.isolated)"
    )
    user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--inh-caps=-all"]
    if python is None or subprocess.run([*user, python, "-c", "import megamem"], cwd=ROOT, check=False).returncode:
        pytest.skip("nobody may not read this checkout, or has no Python")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*user, python, "-c", program], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert done.stdout.startswith("['nobody', 'nobody']")
    assert processes.find(folder / "c") == []
