"""Training through SLURM that is disturbed ends as designed: with the undisturbed run's losses, bit for bit, and no process left.

Two nodes of three, two ranks each, train the model and memories of the quickstart on a little of its data.
"""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megamem.observe.journal import read_journal
from megamem.testing.slurm_cluster import SlurmCluster
from megamem.testing.slurm_cluster.processes import Process
from megamem_launch.rundir import (
    cancelled_file,
    excluded_file,
    finished_file,
    incarnations_file,
    jobs_file,
    read_json,
    read_lines,
)

pytestmark = pytest.mark.timeout(900)

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
DATA = ["data.sources=[{kind: python_stdlib, max_documents: 60}]", "data.workers=1"]
STEPS, INTERVAL = 9, 3
MINUTES = 30
HANG_SECONDS = 30
SECONDS = 200.0
"""For one incarnation on two busy cores, most of it imports."""


def megamem(*arguments: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a verb; what it prints."""
    command = [sys.executable, "-m", "megamem.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=env, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


class Run:
    """A run that was submitted with ``megamem launch slurm``."""

    def __init__(
        self, cluster: SlurmCluster, folder: Path, data: Path, *, steps: int = STEPS, **slurm: str | int
    ) -> None:
        self.cluster = cluster
        self.steps = steps
        description = {
            "name": "test",
            "nodes": 2,
            "ranks_per_node": 2,
            "cpus_per_node": 4,
            "slurm": {
                "time": str(MINUTES),
                "signal_seconds": 60,
                "hang_seconds": 120,
                "preflight": False,
                "environment": {"OMP_NUM_THREADS": "1"},
                **slurm,
            },
        }
        folder.mkdir(parents=True)
        (folder / "cluster.yaml").write_text(yaml.safe_dump(description), encoding="utf-8")
        settings = [
            f"runs_dir={folder}",
            "name=run",
            f"data.path={data}",
            f"train.steps={steps}",
            "train.micro_batch_size=2",
            "train.eval_batches=1",
            "train.eval_interval=1000",
            "train.log_interval=1",
            "optimizer.warmup_steps=2",
            f"checkpoint.interval={INTERVAL}",
            "tracking.mlflow=false",
        ]
        self.dir = folder / "run"
        megamem("launch", "slurm", CONFIG, *settings, "--cluster", folder / "cluster.yaml", env=cluster.env)
        self.job = int(read_lines(jobs_file(self.dir))[-1]["job_id"])

    def history(self) -> list[dict]:
        """Step entries of the journal."""
        path = self.dir / "journal.jsonl"
        return [entry for entry in read_journal(path) if entry["kind"] == "step"] if path.exists() else []

    def losses(self) -> list[tuple[int, float, float]]:
        """Step, loss and norm of the gradient."""
        return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in self.history()]

    def step(self) -> int:
        """The last step that is in the journal."""
        return max((entry["step"] for entry in self.history()), default=0)

    def starts(self) -> list[dict]:
        """Records of the starts of incarnations."""
        return [entry for entry in read_lines(incarnations_file(self.dir)) if entry["event"] == "start"]

    def outcomes(self) -> list[str]:
        """How incarnations ended, as far as their supervisor lived to say."""
        return [entry["outcome"] for entry in read_lines(incarnations_file(self.dir)) if entry["event"] == "end"]

    def nodes(self) -> list[str]:
        """Of the job, now or at its end; the first is that of the supervisor."""
        nodes = self.cluster.job(self.job)["NodeList"]
        return self.cluster.run(["scontrol", "show", "hostnames", nodes]).stdout.split()

    def wait_step(self, step: int) -> None:
        """Until the run has done ``step`` steps."""

        def reached() -> bool:
            state = self.cluster.job(self.job)["JobState"]
            assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"{state}: {self.log()}"
            return self.step() >= step

        self.cluster.wait(reached, f"step {step} of job {self.job}", SECONDS)

    def disturb(self, disturbance: Callable[[Run], None], *, restarts: bool) -> None:
        """Do something to the run; if it then ``restarts``, wait until it has been requeued and end SLURM's 120 s of patience."""
        before = self.restarts()
        disturbance(self)
        if restarts:
            self.cluster.wait(lambda: self.restarts() > before, f"the requeue of job {self.job}: {self.log()}", SECONDS)
            self.cluster.run(["scontrol", "update", f"jobid={self.job}", f"TimeLimit={MINUTES}"])
            self.cluster.release(self.job)

    def rank(self) -> int:
        """Process id of a rank on the second node, where there is one yet."""
        found: list[int] = []

        def looked() -> bool:
            ranks = [
                p for p in self.cluster.node_processes(self.nodes()[1]) if "megamem_launch.supervise.rank" in p.argv
            ]
            pids = {rank.pid for rank in ranks}
            found.extend(rank.pid for rank in ranks if rank.parent not in pids)  # children read data
            return bool(found)

        self.cluster.wait(looked, f"a rank of job {self.job}", SECONDS)
        return found[0]

    def signal_rank(self, number: signal.Signals) -> None:
        """Send a signal to one rank, and wait until the supervisor has started all of them again."""
        before = len(self.starts())
        os.kill(self.rank(), number)
        self.cluster.wait(lambda: len(self.starts()) > before, f"another start: {self.log()}", SECONDS)

    def restarts(self) -> int:
        """How often the job was requeued."""
        return int(self.cluster.job(self.job)["Restarts"])

    def wait_end(self, state: str = "COMPLETED") -> None:
        """Until the job has ended, in ``state``."""
        try:
            self.cluster.wait_state(self.job, {state}, SECONDS + 5 * self.steps)
        except Exception as error:
            error.add_note(self.log())
            raise

    def log(self) -> str:
        """The ends of what the jobs and their ranks printed."""
        logs = sorted((self.dir / "launch" / "logs").rglob("*.log"))
        return "\n".join(f"--- {p.name}\n{p.read_text(encoding='utf-8', errors='replace')[-1500:]}" for p in logs)


@pytest.fixture(scope="session")
def prepared_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data for the quickstart's tokenizer, tree and sequence length from few documents."""
    path = tmp_path_factory.mktemp("data") / "quickstart"
    megamem("data", "prepare", CONFIG, f"data.path={path}", *DATA)
    return path


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """As that of the other tests, without GPUs: SLURM 22.05 loses count of those of an exclusive job whose node was lost
    ("bad node_offset" in its log), and then refuses every further exclusive job."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        SlurmCluster.start(Path(folder), nodes=3, gpus=0) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def undisturbed(
    slurm_cluster: SlurmCluster, prepared_quickstart: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[tuple[int, float, float]]]:
    """Steps, losses and norms of a run of so many steps that nothing happens to."""

    @functools.cache
    def losses(steps: int) -> list[tuple[int, float, float]]:
        slurm_cluster.reset()
        run = Run(slurm_cluster, tmp_path_factory.mktemp("undisturbed") / "runs", prepared_quickstart, steps=steps)
        run.wait_end()
        assert run.outcomes() == ["finished"], run.log()
        assert [step for step, _, _ in run.losses()] == list(range(1, steps + 1))
        assert read_json(finished_file(run.dir))["step"] == steps
        return run.losses()

    return losses


def time_limit(run: Run) -> None:
    """One to two minutes are left, and the warning of SLURM comes, which by itself would take its time."""
    elapsed = int(run.cluster.job(run.job)["RunTime"].split(":")[1])
    run.cluster.run(["scontrol", "update", f"jobid={run.job}", f"TimeLimit={elapsed + 2}"])
    run.cluster.run(["scancel", "--batch", "--signal=USR1", str(run.job)])


def preemption(run: Run) -> None:
    """A job that goes first wants all nodes."""
    nodes = f"--nodes={len(run.cluster.nodes)}"
    high = run.cluster.sbatch("true", "--partition=high", "--exclusive", nodes)
    run.cluster.wait_state(high, {"COMPLETED"})


def requeue(run: Run) -> None:
    """A person or an administrator requeues the job."""
    run.cluster.run(["scontrol", "requeue", str(run.job)])


def node_set_down(run: Run) -> None:
    """An administrator takes a node away."""
    run.cluster.set_down(run.nodes()[1])


def power_loss(run: Run) -> None:
    """A node without supervisor dies: the supervisor notices, SLURM itself would only after its time-out."""
    run.cluster.kill_node(run.nodes()[1])


def power_loss_of_supervisor(run: Run) -> None:
    """The node of the batch step dies: only SLURM can notice."""
    run.cluster.kill_node(run.nodes()[0])


def slurmd_restarted(run: Run) -> None:
    """A daemon dies and comes back before SLURM gives the node up: nothing of the job was lost."""
    node = run.nodes()[1]
    run.cluster.kill_slurmd(node)
    run.wait_step(run.step() + 1)
    run.cluster.start_node(node)


def slurmd_lost(run: Run) -> None:
    """A daemon dies for good, and its ranks live on until SLURM gives the node up."""
    run.cluster.kill_slurmd(run.nodes()[1])


def rank_killed(run: Run) -> None:
    """As the kernel does where memory runs out."""
    run.signal_rank(signal.SIGKILL)


def rank_stopped(run: Run) -> None:
    """A rank that lives and does nothing, on a node whose processes the supervisor cannot see."""
    run.signal_rank(signal.SIGSTOP)


IN_PLACE = (slurmd_restarted, rank_killed, rank_stopped)
"""After these the job stays where it is."""


@dataclass(frozen=True)
class Scenario:
    """What happens to a run, and how it must go on."""

    disturbance: Callable[[Run], None]
    outcomes: tuple[str, ...]
    """Of the incarnations before the last; empty where none ends."""
    saves: bool = False
    """Whether the run goes on from the very step at which it was disturbed, or later."""
    excludes: bool = False
    """Whether the lost node is avoided from then on."""
    slurm: tuple[tuple[str, str | int], ...] = ()
    steps: int = STEPS
    reason: str = ""
    """A regular expression for what the first end says."""
    slow: bool = True


SCENARIOS = {
    "time limit": Scenario(time_limit, ("time_limit",), saves=True, slow=False),
    "preemption": Scenario(preemption, ("preempted",), saves=True, slurm=(("partition", "low"),)),
    "requeue": Scenario(requeue, ("preempted",), slurm=(("mode", "srun"),)),
    "node set down": Scenario(node_set_down, ("node_failure",)),
    "power loss": Scenario(power_loss, ("node_failure",), excludes=True),
    "power loss of the supervisor": Scenario(power_loss_of_supervisor, ("",)),
    "power loss, srun": Scenario(power_loss, ("node_failure",), excludes=True, slurm=(("mode", "srun"),)),
    "slurmd restarted": Scenario(slurmd_restarted, ()),
    "slurmd lost": Scenario(  # SLURM waits a minute and more, in which 9 steps are done
        slurmd_lost, ("node_failure",), excludes=True, steps=150
    ),
    "rank killed": Scenario(rank_killed, ("crash",), reason=r"rank [23] on node\d: was ended by signal 9"),
    "rank stopped": Scenario(
        rank_stopped,
        ("hang",),
        slurm=(("hang_seconds", HANG_SECONDS),),
        reason=r"rank [23] \(node\d, pid \d+\) is late: it is stopped \(SIGSTOP\) in phase .* 3 others",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if SCENARIOS[name].slow else []) for name in SCENARIOS]
)
def test_disturbed_run_ends_like_the_undisturbed_one(
    name: str,
    cluster: SlurmCluster,
    prepared_quickstart: Path,
    undisturbed: Callable[[int], list[tuple[int, float, float]]],
    tmp_path: Path,
) -> None:
    scenario = SCENARIOS[name]
    wanted = undisturbed(scenario.steps)
    run = Run(cluster, tmp_path / "runs", prepared_quickstart, steps=scenario.steps, **dict(scenario.slurm))
    run.wait_step(INTERVAL + 1)
    before, nodes = run.step(), run.nodes()
    run.disturb(scenario.disturbance, restarts=scenario.disturbance not in IN_PLACE)
    run.wait_end()

    assert run.losses() == wanted
    assert len(run.starts()) == 1 + len(scenario.outcomes), run.log()
    said = [outcome for outcome in scenario.outcomes if outcome]
    assert run.outcomes() == [*said, "finished"], run.log()
    if scenario.reason:
        ends = [entry for entry in read_lines(incarnations_file(run.dir)) if entry["event"] == "end"]
        assert re.match(scenario.reason, ends[0]["reason"]), ends[0]["reason"]
    if scenario.saves:
        assert run.starts()[-1]["step"] >= before, "the run went back to an older checkpoint"
    if scenario.excludes:
        assert list(read_json(excluded_file(run.dir)) or {}) == nodes[1:]
        assert nodes[1] not in run.nodes()
    cluster.wait(lambda: not cluster.job_processes(), "the end of all processes of the job", 20)


@pytest.mark.parametrize("how", ["megamem launch cancel", pytest.param("scancel", marks=pytest.mark.slow)])
def test_cancelled_run_stays_cancelled(
    how: str, cluster: SlurmCluster, prepared_quickstart: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path / "runs", prepared_quickstart, steps=200)
    run.wait_step(INTERVAL + 1)
    if how == "scancel":
        cluster.run(["scancel", str(run.job)])
    else:
        megamem("launch", "cancel", run.dir, env=cluster.env)
        assert cancelled_file(run.dir).exists()
    run.wait_end("CANCELLED")
    cluster.wait(lambda: not cluster.job_processes(), "the end of all processes of the job", 30)
    reached = run.step()
    time.sleep(3)
    assert cluster.job(run.job)["JobState"] == "CANCELLED", "it came back to life"
    assert run.step() == reached < run.steps and not finished_file(run.dir).exists()
    assert run.outcomes() in ([], ["cancelled"])
    if how != "scancel":  # after which ranks get KillWait to notice
        asked = cancelled_file(run.dir).stat().st_mtime
        assert run.history()[-1]["time"] < asked + 5, "its ranks trained on"


def ignores_usr1(process: Process) -> bool:
    """As the shell does from the script's first line on, and what it starts from their beginning."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    found = re.search(r"^SigIgn:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def test_warning_at_the_very_start_does_not_fail_the_job(
    cluster: SlurmCluster, prepared_quickstart: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path / "runs", prepared_quickstart)
    cluster.wait(lambda: any(map(ignores_usr1, cluster.job_processes())), "the script's first line")
    cluster.run(["scancel", "--batch", "--signal=USR1", str(run.job)])
    cluster.wait(lambda: run.starts() != [], f"the supervisor: {run.log()}")
    assert cluster.job(run.job)["JobState"] == "RUNNING"


RANDOM_DISTURBANCES = (
    time_limit,
    preemption,
    requeue,
    node_set_down,
    power_loss,
    power_loss_of_supervisor,
    slurmd_restarted,
    rank_killed,
    rank_stopped,
)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_random_disturbances(cluster: SlurmCluster, prepared_quickstart: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    generator, wanted, steps = random.Random(seed), 20, 120
    print(f"seed {seed}")
    reference = Run(cluster, tmp_path / "reference", prepared_quickstart, steps=steps)
    reference.wait_end()
    patience = {"restarts": wanted, "hang_seconds": HANG_SECONDS, "start_seconds": 120}
    run = Run(cluster, tmp_path / "runs", prepared_quickstart, steps=steps, partition="low", **patience)
    for number in range(wanted):
        if generator.random() < 0.2:  # while the ranks start
            cluster.wait(lambda: cluster.job(run.job)["JobState"] == "RUNNING", "a start", SECONDS)
            time.sleep(generator.uniform(0, 15))
        else:
            run.wait_step(run.step() + generator.randint(1, 4))
            time.sleep(generator.uniform(0, 1))
        disturbance = generator.choice(RANDOM_DISTURBANCES)
        print(f"{number + 1}: {disturbance.__name__} at step {run.step()}", flush=True)
        run.disturb(disturbance, restarts=disturbance not in IN_PLACE)
        cluster.mend()
    run.wait_end()
    assert run.losses() == reference.losses()
    assert run.outcomes()[-1] == "finished"
    cluster.wait(lambda: not cluster.job_processes(), "the end of all processes of the job", 20)
