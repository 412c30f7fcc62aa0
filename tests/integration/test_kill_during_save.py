"""SIGKILL at random points of asynchronous, incremental saves: what is left is always a whole checkpoint of a moment that was."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megamem.memory.config import DiskConfig, RowOptimizerConfig, StorageConfig
from megamem.memory.optimizers import build_row_optimizer
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem.memory.tiers.resources import TierResources
from megamem.models.canonical import CanonicalEntry
from megamem.observe.journal import read_journal
from megamem_checkpoints import directory
from megamem_checkpoints.checkpointer import Checkpointer
from megamem_checkpoints.config import CheckpointConfig
from megamem_checkpoints.diff import compare_checkpoints
from megamem_checkpoints.integrity import Verification
from megamem_checkpoints.reader import CheckpointReader
from megamem_launch.quickstart import kill_family

STEPS, KILLS = 12, 5
"""Steps of a run, each of which is saved, and the kills that it has to survive."""
ROWS, WIDTH = 3001, 8
SHARES = (0.02, 0.1, 0.5)
"""Rows that a step updates, in turn: increments, and tables that are written whole."""
OPERATIONS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


class Run:
    """Two tables, one of them on disk, and a dense tensor with moments; step n changes them by what is a function of n."""

    def __init__(self, tiers: Path, resume: str = "") -> None:
        self.optimizer = build_row_optimizer(RowOptimizerConfig(name="rowwise_adagrad"))
        resources = TierResources(disk_root=tiers, disk=DiskConfig(cache_gib=3e-5), resume=resume)
        self.tables = {
            name: OwnedTable.create(
                TableSpec(name, ROWS, WIDTH, (InitSegment(WIDTH, 0.1),)),
                seed=1,
                storage=StorageConfig(tier=tier),
                state_fields=self.optimizer.state_fields(WIDTH),
                resources=resources,
            )
            for name, tier in (("a.table", "host"), ("b.table", "disk"))
        }
        self.weight = nn.Parameter(torch.zeros(257, 33))
        self.entries = [CanonicalEntry("weight", self.weight, slice(None), None)]
        self.states = {"master": self.weight.detach(), "exp_avg": torch.zeros(257, 33)}

    def train(self, step: int) -> None:
        rng = np.random.default_rng(step)
        for name, table in self.tables.items():
            touched = rng.permutation(ROWS)[: int(SHARES[step % 3] * ROWS)]
            gradient = torch.from_numpy(rng.standard_normal((len(touched), WIDTH), dtype=np.float32))
            self.optimizer.update(table, touched, gradient, lr=0.1 + len(name), step=step)
        for state in self.states.values():
            state.mul_(0.9).add_(torch.from_numpy(rng.standard_normal(state.shape, dtype=np.float32)))

    def put(self, tensor: Tensor, states: dict[str, Tensor]) -> None:
        for name, value in states.items():
            self.states[name].copy_(value)

    def digest(self) -> str:
        """Of every bit."""
        digest = hashlib.sha256()
        content: dict[str, Tensor] = dict(self.states)
        for name, table in self.tables.items():
            content |= {f"{name}.{key}": value for key, value in table.read(0, ROWS).items()}
        for name, value in sorted(content.items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        for table in self.tables.values():
            table.close()


def live(folder: Path, operation: int, seconds: float) -> None:
    """One process of a run: go on from the latest checkpoint to the last step, unless SIGKILL comes first: with the n-th
    operation on files below ``folder``, or this long after training began. 0 for never."""
    torch.set_num_threads(1)
    checkpoints = folder / "checkpoints"
    latest = directory.latest(checkpoints)
    run = Run(folder / "tiers", CheckpointReader(latest).label if latest is not None else "")
    config = CheckpointConfig(asynchronous=True, incremental="auto", keep=2)
    checkpointer = Checkpointer(checkpoints, config, groups=None)
    done = 0
    if latest is not None:
        done = checkpointer.load(latest, entries=run.entries, put_state=run.put, tables=run.tables)["step"]
    if operation:
        die_with(operation, str(checkpoints))
    if seconds:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for step in range(done + 1, STEPS + 1):
        run.train(step)
        checkpointer.start(step, entries=run.entries, state_of=lambda _: run.states, tables=run.tables, meta={})
    checkpointer.wait()
    run.close()
    os._exit(0)  # without waiting for the timer


def die_with(operation: int, folder: str) -> None:
    """SIGKILL for this process with the n-th operation on files below ``folder``, in whichever thread."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and (event != "open" or str(arguments[0]).startswith(folder)):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Digest of the state after every step of a run that nobody disturbs and that saves nothing."""
    run = Run(tmp_path_factory.mktemp("reference"))
    digests = {}
    for step in range(1, STEPS + 1):
        run.train(step)
        digests[step] = run.digest()
    run.close()
    return digests


def start(folder: Path, operation: int, seconds: float) -> int:
    """Exit code of a process that runs :func:`live`."""
    context = multiprocessing.get_context("forkserver")
    # Has no effect where a test before has started the server.
    context.set_forkserver_preload(["torch", "megamem.models.canonical", "megamem_checkpoints.checkpointer"])
    process = context.Process(target=live, args=(folder, operation, seconds))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "a process hangs"
    return process.exitcode


def survivor(folder: Path, moments: Mapping[int, str], scratch: Path) -> int:
    """The step of the latest checkpoint, 0 for none; every checkpoint must be whole, and each be what the run held then."""
    for path in directory.steps(folder / "checkpoints"):
        (checked,) = Verification([path]).run(threads=1)
        assert not checked.damaged
        fresh = Run(scratch)
        checkpointer = Checkpointer(folder / "checkpoints", CheckpointConfig(), groups=None)
        loaded = checkpointer.load(path, entries=fresh.entries, put_state=fresh.put, tables=fresh.tables)
        assert fresh.digest() == moments[loaded["step"]]
        fresh.close()
    latest = directory.latest(folder / "checkpoints")
    return CheckpointReader(latest).step if latest is not None else 0


def survive(seed: int, moments: Mapping[int, str], tmp_path: Path) -> int:
    """Kill one run KILLS times, at points drawn from ``seed``, then let it end; returns how many kills hit it."""
    draw, hits, reached = random.Random(seed), 0, 0
    folder = tmp_path / str(seed)
    for _ in range(KILLS):
        by_operation = draw.random() < 0.6
        code = start(folder, draw.randint(1, 60) if by_operation else 0, 0 if by_operation else draw.uniform(0, 0.1))
        assert code in (0, -signal.SIGKILL)
        hits += code != 0
        step = survivor(folder, moments, tmp_path / "scratch")
        assert step >= reached
        reached = step
    assert start(folder, 0, 0) == 0
    assert survivor(folder, moments, tmp_path / "scratch") == STEPS
    increments = CheckpointReader(directory.latest(folder / "checkpoints") or folder).manifest.tables
    print(f"seed {seed}: {hits} kills, increments {[len(t.increments) for t in increments.values()]}")
    return hits


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_again_and_again(seed: int, moments: dict[int, str], tmp_path: Path) -> None:
    assert survive(seed, moments, tmp_path) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_kills(moments: dict[int, str], tmp_path: Path) -> None:
    hits, seed = 0, 100
    while hits < 50:
        hits += survive(seed, moments, tmp_path)
        seed += 1
    print(f"{hits} kills in {seed - 100} runs")


CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
FORMS = {
    "one-process": [],
    "dp2-ep2": ["parallel.nproc=2", "parallel.expert_model_parallel_size=2"],
    "tp2-pp2": [
        "parallel.nproc=4",
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "parallel.pipeline_model_parallel_size=2",
    ],
    "disk-prefetch-3": ["memory.storage.tier=disk", "memory.prefetch_depth=3"],
    "bf16-always-increments": ["memory.storage.format=bf16", "checkpoint.incremental=on"],
}


def command(folder: Path, data: Path, form: str) -> list[str]:
    settings = [
        f"runs_dir={folder}",
        f"data.path={data}",
        f"train.steps={STEPS}",
        "train.precision=fp32",
        "train.eval_batches=0",
        "checkpoint.interval=1",
        "tracking.mlflow=false",
        *FORMS[form],
    ]
    return [sys.executable, "-m", "megamem.cli", "train", str(CONFIG), *settings]


def train(folder: Path, data: Path, form: str) -> Path:
    """Run to the end; returns the directory of checkpoints."""
    done = subprocess.run(command(folder, data, form), capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "tiny" / "checkpoints"


def kill_in_save(folder: Path, data: Path, form: str, step: int, delay: float) -> None:
    """SIGKILL for all ranks this many seconds after the save of ``step`` was begun."""
    process = subprocess.Popen(command(folder, data, form), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints, victim = folder / "tiny" / "checkpoints", directory.name_of(step)
    try:
        deadline = time.monotonic() + 200
        while not (checkpoints / f"{victim}.tmp").exists() and not (checkpoints / victim).exists():
            assert process.poll() is None, "training ended before it was killed"
            assert time.monotonic() < deadline, "training did not reach the save"
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        kill_family(process)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", FORMS)
def test_whole_runs(form: str, prepared_tiny: Path, tmp_path: Path) -> None:
    draw = random.Random(form)
    whole, killed = train(tmp_path / "whole", prepared_tiny, form), tmp_path / "killed" / "tiny" / "checkpoints"
    for step in sorted(draw.sample(range(2, STEPS), 3)):
        kill_in_save(tmp_path / "killed", prepared_tiny, form, step, draw.uniform(0, 0.05))
        assert directory.latest(killed) is not None
        assert not any(checked.damaged for checked in Verification(directory.steps(killed)).run(threads=2))
    train(tmp_path / "killed", prepared_tiny, form)
    last = directory.name_of(STEPS)
    found = compare_checkpoints(CheckpointReader(whole / last), CheckpointReader(killed / last))
    assert found.equal, found
    losses = [
        [entry["loss"] for entry in read_journal(path.parent / "journal.jsonl") if entry["kind"] == "step"]
        for path in (whole, killed)
    ]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]
