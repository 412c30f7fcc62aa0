"""``megamem launch local``: ranks that fail are started again, and what a person asks for is done."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megamem.observe.journal import read_journal
from megamem_launch import rundir
from megamem_launch.watch.beats import read_beats

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SECONDS = 150.0  # on a busy machine
CODE = "import sys; from megamem_launch.verbs.launch_local import main; sys.exit(main(sys.argv[1:]))"


def command(run: Path, data: Path, steps: int, *extra: str) -> list[str]:
    settings = [
        f"runs_dir={run.parent}",
        f"name={run.name}",
        f"data.path={data}",
        f"train.steps={steps}",
        "train.eval_batches=1",
        "train.eval_interval=1000",
        "train.log_interval=1000",
        "tracking.mlflow=false",
    ]
    return [sys.executable, "-c", CODE, str(CONFIG), *settings, *extra]


def losses(run: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_journal(run / "journal.jsonl") if e["kind"] == "step"}


def history(run: Path) -> list[dict]:
    return rundir.read_lines(rundir.incarnations_file(run))


def outcomes(run: Path) -> list[str]:
    return [entry["outcome"] for entry in history(run) if entry["event"] == "end"]


def wait_until(holds: Callable[[], bool], process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None, f"the supervisor ended before {what}"
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)


def ranks_of(run: Path) -> dict[int, psutil.Process]:
    """The ranks that beat now, by number."""
    beats = read_beats(rundir.live_dir(run, history(run)[-1]["incarnation"]))
    return {rank: psutil.Process(beat.pid) for rank, beat in beats.items()}


def tracked_runs(folder: Path) -> set[str]:
    """Ids of all that MLflow knows of."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    known = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {entry.info.run_id for entry in known}


def start(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where pytest is in the background
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for the end, which must be with ``code``; what was printed."""
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == code, output
    return output


def test_a_killed_rank_is_started_again_and_stop_is_obeyed(prepared_tiny: Path, tmp_path: Path) -> None:
    """Two ranks: one is killed, then the run is stopped by its file, then it goes on to its end: one line of losses."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    steps = 60
    two = ("--nproc", "2", "checkpoint.interval=10", "tracking.mlflow=true")
    finish(start(command(whole, prepared_tiny, steps, *two)))
    assert outcomes(whole) == ["finished"]

    process = start(command(run, prepared_tiny, steps, *two))
    wait_until(lambda: (run / "checkpoints" / "latest").exists(), process, "the first checkpoint")
    ranks = ranks_of(run)
    ranks[1].kill()
    wait_until(lambda: outcomes(run) == ["crash"], process, "the end of the ranks")
    assert not psutil.wait_procs(list(ranks.values()), timeout=0)[1]
    wait_until(lambda: len(history(run)) == 3, process, "the second start")
    (run / "STOP").touch()
    output = finish(process)
    assert outcomes(run) == ["crash", "stopped"]
    assert "rank 1 on" in history(run)[1]["reason"] and "SIGKILL" in history(run)[1]["reason"]
    assert "step 1/60" in output or "validation loss" in output  # what rank 0 says is on the supervisor's output
    assert not rundir.finished_file(run).exists()

    finish(start(command(run, prepared_tiny, steps, *two)))
    assert outcomes(run) == ["crash", "stopped", "finished"]
    assert losses(run) == losses(whole)
    # One for each, though the second had three incarnations. (The first has made MLflow's database: a kill meanwhile spoils it.)
    assert tracked_runs(tmp_path) == {(path / "mlflow_run_id").read_text().strip() for path in (whole, run)}
    assert "has trained all 60 steps" in finish(start(command(run, prepared_tiny, steps, *two)))
    assert len(outcomes(run)) == 3


def test_a_run_that_cannot_progress_gives_up(prepared_tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(command(run, prepared_tiny, 100000, "--restarts", "1", "checkpoint.interval=0"))
    for number in range(2):
        wait_until(lambda n=number: len(history(run)) == 2 * n + 1, process, "a start")
        wait_until(lambda: bool(ranks_of(run)), process, "a sign of life")
        ranks_of(run)[0].kill()
        if number == 0:
            wait_until(lambda: len(outcomes(run)) == 1, process, "the end")
    finish(process, 1)
    assert outcomes(run) == ["crash", "crash"]
    assert "2 starts in a row brought no newer checkpoint" in history(run)[-1]["reason"]


def test_what_only_a_person_can_mend_is_not_tried_again(prepared_tiny: Path, tmp_path: Path) -> None:
    finish(start(command(tmp_path / "run", prepared_tiny, 5, f"data.path={tmp_path / 'nowhere'}")), 2)
    assert outcomes(tmp_path / "run") == ["fatal"]
    assert "nowhere" in history(tmp_path / "run")[-1]["reason"]


def test_an_interrupt_saves_and_leaves_no_process(prepared_tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(command(run, prepared_tiny, 100000, "checkpoint.interval=0"))
    wait_until(lambda: (run / "journal.jsonl").exists() and bool(losses(run)), process, "the first step")
    ranks = ranks_of(run)
    process.send_signal(signal.SIGINT)
    finish(process)
    assert outcomes(run) == ["stopped"]
    assert history(run)[-1]["step"] == max(losses(run)) > 0
    assert not psutil.wait_procs(list(ranks.values()), timeout=5)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_supervisor_takes_its_ranks_along(prepared_tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(command(run, prepared_tiny, 100000))
    wait_until(lambda: bool(history(run)) and bool(ranks_of(run)), process, "a sign of life")
    ranks = list(ranks_of(run).values())
    ranks[0].suspend()  # a stopped process is killed all the same
    process.kill()
    process.communicate(timeout=SECONDS)
    assert not psutil.wait_procs(ranks, timeout=30)[1]
