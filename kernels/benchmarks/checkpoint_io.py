"""How fast checkpoints are written and read, next to a plain copy of the same files; what an asynchronous save costs a run.

The peer of a save copies the checkpoint's own files one after another in blocks of 8 MiB and flushes each (``dd conv=fsync``); the
peer of a load reads them the same way. Both start from a disk that has nothing left to write and, for loads, from an empty page
cache, and take turns with ours in every round: only ratios of one round mean anything on a shared disk. Ours also computes the
sha256 of everything written and checks that of everything read. Then a training loop saves in the background: the time it is
blocked, how much longer its steps take meanwhile, and the peak of its memory. Prints tables and writes JSON::

    python kernels/benchmarks/checkpoint_io.py --table-gib 2 --dense-gib 0.5 --out runs/bench/checkpoint_io.json
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from training import make_trainer, run_steps

from megamem.memory.config import EngramConfig, MemoryConfig, RowOptimizerConfig
from megamem.memory.optimizers import build_row_optimizer
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem.models.canonical import CanonicalEntry, canonical_entries
from megamem.models.config import ModelConfig
from megamem.parallel.groups import init_distributed
from megamem_checkpoints.checkpointer import Checkpointer
from megamem_checkpoints.config import CheckpointConfig

WIDTH = 64
BLOCK = 8 * 2**20


@dataclass
class Arguments:
    """Measure saves and loads."""

    table_gib: float = 2.0
    """Size of the table with its optimizer state (rowwise_adagrad)."""
    dense_gib: float = 0.5
    """Size of the dense state: master weights and two moments."""
    changed: float = 0.1
    """Share of the rows that change between two incremental saves."""
    rounds: int = 5
    """Times that each has its turn; none to leave bandwidths out."""
    step_table_gib: float = 1.0
    """Size of the table, with its state, of the run that saves in the background."""
    step_blocks: int = 4
    """Times that the run trains with a save and without; none to leave this out."""
    block_steps: int = 12
    """Steps of 4,096 tokens in each block: a save begins with the first."""
    io_threads: int = 2
    """Setting checkpoint.io_threads."""
    path: Path = Path("runs/bench/checkpoint_io")
    """Where the files go: the disk that is measured."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/bench/checkpoint_io.json")
    """Where the JSON goes."""


class State:
    """A state to save: a dense tensor with moments, or a table."""

    def __init__(self, *, table_gib: float = 0.0, dense_gib: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(1)
        rows = int(dense_gib * 2**30 / 3 / 4 / 1024)
        names = [f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in range(16 if rows else 1)]
        self.entries: list[CanonicalEntry] = []
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        for name in names:
            weight = nn.Parameter(torch.randn(max(1, rows // len(names)), 1024, generator=generator))
            moments = {moment: torch.rand(weight.shape, generator=generator) for moment in ("exp_avg", "exp_avg_sq")}
            self.states[id(weight)] = {"master": weight.detach(), **moments}
            self.entries.append(CanonicalEntry(name, weight, slice(None), None))
        self.tables: dict[str, OwnedTable] = {}
        self.optimizer = build_row_optimizer(RowOptimizerConfig(name="rowwise_adagrad"))
        if table_gib:
            self.rows = int(table_gib * 2**30 / (4 * WIDTH + 5))
            spec = TableSpec("table", self.rows, WIDTH, (InitSegment(WIDTH, 0.02),))
            fields = self.optimizer.state_fields(WIDTH)
            self.tables["table"] = OwnedTable.create(spec, seed=1, state_fields=fields)

    def change(self, share: float, step: int) -> None:
        """Update a random ``share`` of the rows."""
        rng = np.random.default_rng(step)
        touched = np.sort(rng.permutation(self.rows)[: int(share * self.rows)])
        for low in range(0, len(touched), 1 << 16):
            part = touched[low : low + (1 << 16)]
            gradient = torch.from_numpy(rng.standard_normal((len(part), WIDTH), dtype=np.float32))
            self.optimizer.update(self.tables["table"], part, gradient, lr=0.1, step=step)

    def put(self, tensor: nn.Parameter, states: dict[str, torch.Tensor]) -> None:
        """Take over what was loaded."""
        for name, value in states.items():
            self.states[id(tensor)][name].copy_(value)


def files_of(checkpoint: Path) -> list[Path]:
    """The files that one save wrote: linked ones are of another."""
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.stat().st_nlink == 1]


def copy(paths: list[Path], target: Path) -> None:
    """``dd bs=8M conv=fsync`` of each file."""
    target.mkdir(parents=True)
    for number, path in enumerate(paths):
        with path.open("rb", buffering=0) as source, (target / str(number)).open("wb", buffering=0) as sink:
            while block := source.read(BLOCK):
                sink.write(block)
            os.fsync(sink.fileno())


def read(paths: list[Path]) -> None:
    """Every byte of each file, into one buffer."""
    buffer = bytearray(BLOCK)
    for path in paths:
        with path.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def forget(paths: list[Path]) -> None:
    """Take files out of the page cache."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(action: Callable[[], object]) -> float:
    """Wall time, from a disk that has nothing left to write."""
    os.sync()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def bandwidths(arguments: Arguments, name: str, state: State, *, changed: float = 0.0) -> list[dict[str, Any]]:
    """Saves and loads of a state against the peer. With ``changed``, saves are incremental and loads are left out."""
    shutil.rmtree(arguments.path, ignore_errors=True)
    config = CheckpointConfig(keep=2, incremental="on" if changed else "off", io_threads=arguments.io_threads)
    checkpointer = Checkpointer(arguments.path, config, groups=None)

    def save(step: int) -> Path:
        return checkpointer.save(
            step, entries=state.entries, state_of=lambda tensor: state.states[id(tensor)], tables=state.tables, meta={}
        )

    def load(path: Path, verify: bool) -> None:
        Checkpointer(arguments.path, config, groups=None).load(
            path, entries=state.entries, put_state=state.put, tables=state.tables, verify=verify
        )

    save(1)
    ours: list[float] = []
    peer: list[float] = []
    loads: dict[str, list[float]] = {"load": [], "load, checksums verified": []}
    reads: list[float] = []
    size = 0
    for step in range(2, arguments.rounds + 2):
        if changed:
            # A base of its own for every round, so that rounds are alike.
            checkpointer = Checkpointer(arguments.path, config, groups=None)
            checkpointer.load(
                arguments.path / "step_00000001", entries=state.entries, put_state=state.put, tables=state.tables
            )
            state.change(changed, step)
        ours.append(seconds(lambda step=step: save(step)))  # type: ignore[misc]
        path = arguments.path / f"step_{step:08d}"
        paths = files_of(path)
        size = sum(file.stat().st_size for file in paths)
        peer.append(seconds(lambda paths=paths: copy(paths, arguments.path / "copy")))  # type: ignore[misc]
        if not changed:
            for label, times in loads.items():
                forget(paths)
                times.append(seconds(lambda label=label, path=path: load(path, "verified" in label)))  # type: ignore[misc]
            forget(paths)
            reads.append(seconds(lambda paths=paths: read(paths)))  # type: ignore[misc]
        shutil.rmtree(arguments.path / "copy")
        shutil.rmtree(path)
    shutil.rmtree(arguments.path)
    rows = [_row(f"{name}: save", size, ours, peer)]
    rows += [_row(f"{name}: {label}", size, times, reads) for label, times in loads.items() if times]
    return rows


def _row(name: str, size: int, ours: list[float], peer: list[float]) -> dict[str, Any]:
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    return {
        "name": name,
        "gib": size / 2**30,
        "seconds": ours,
        "peer_seconds": peer,
        "gib_per_second": size / 2**30 / min(ours),
        "peer_gib_per_second": size / 2**30 / min(peer),
        "ratio_min": min(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_max": max(ratios),
    }


def _peak_from_here() -> Callable[[], int]:
    """Begin anew to measure the peak resident set of this process; the result says what it has been since, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        text = Path("/proc/self/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024

    return peak


def background(arguments: Arguments) -> dict[str, Any]:
    """A run that saves in the background, and the same run without, in turns."""
    shutil.rmtree(arguments.path, ignore_errors=True)
    init_distributed()
    heads = 8
    options = MemoryConfig(
        engram=EngramConfig(
            layers=[1],
            heads=heads,
            width=WIDTH,
            rows_per_head=int(arguments.step_table_gib * 2**30 / (4 * WIDTH + 5) / (2 * heads)),
        ),
        optimizer=RowOptimizerConfig(name="rowwise_adagrad"),
    )
    model = ModelConfig(
        num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4, num_query_groups=2, vocab_size=8192
    )
    steps = arguments.step_blocks * 2 * arguments.block_steps + 3
    trainer, recorder = make_trainer(
        model, options, seq_length=512, micro_batches=8, steps=steps, disk_root=arguments.path / "tiers"
    )
    config = CheckpointConfig(keep=1, incremental="off", io_threads=arguments.io_threads)
    checkpointer = Checkpointer(arguments.path / "checkpoints", config, groups=None)
    entries = canonical_entries(trainer.model, trainer.groups)
    training = run_steps(trainer, steps)
    for _ in range(3):
        next(training)
    result: dict[str, list[float]] = {"blocked": [], "with": [], "without": [], "extra_bytes": [], "save": []}
    size = 0
    for _ in range(arguments.step_blocks):
        os.sync()
        peak = _peak_from_here()
        began = time.perf_counter()
        for _ in range(arguments.block_steps):
            next(training)
        result["without"].append(time.perf_counter() - began)
        before = peak()

        peak = _peak_from_here()
        began = time.perf_counter()
        path = checkpointer.start(
            trainer.progress.step,
            entries=entries,
            state_of=trainer.zero.full_state,
            tables=trainer.memory.tables,
            meta={},
        )
        result["blocked"].append(time.perf_counter() - began)
        ended = 0.0
        for _ in range(arguments.block_steps):
            next(training)
            if not ended and checkpointer.ended():
                ended = time.perf_counter() - began
        result["with"].append(time.perf_counter() - began)
        checkpointer.wait()
        result["save"].append(ended or time.perf_counter() - began)
        result["extra_bytes"].append(peak() - before)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    trainer.memory.close()
    shutil.rmtree(arguments.path)
    step = min(result["without"]) / arguments.block_steps
    return {
        **result,
        "checkpoint_gib": size / 2**30,
        "step_seconds": step,
        "blocked_share_of_a_step": statistics.median(result["blocked"]) / step,
        "slowdown_median": statistics.median(a / b - 1 for a, b in zip(result["with"], result["without"], strict=True)),
        "slowdown_min": min(result["with"]) / min(result["without"]) - 1,
        "extra_gib": max(result["extra_bytes"]) / 2**30,
        "losses_finite": all(np.isfinite(one["loss"]) for one in recorder.steps),
    }


def main() -> None:
    """Measure, print, write."""
    arguments = tyro.cli(Arguments)
    console = Console()
    rows: list[dict[str, Any]] = []
    if arguments.rounds:
        tables, dense = State(table_gib=arguments.table_gib), State(dense_gib=arguments.dense_gib)
        rows += bandwidths(arguments, "tables", tables)
        rows += bandwidths(arguments, f"tables, {arguments.changed:.0%} changed", tables, changed=arguments.changed)
        rows += bandwidths(arguments, "dense", dense)
        del tables, dense
        shown = Table(title="against a copy (save) or a read (load) of the same files", title_justify="left", box=None)
        for column in ("", "GiB", "GiB/s, best", "peer", "peer's time / ours: min", "median", "max"):
            shown.add_column(column, justify="left" if not column else "right")
        for row in rows:
            numbers = [row[key] for key in ("gib", "gib_per_second", "peer_gib_per_second")]
            numbers += [row[f"ratio_{key}"] for key in ("min", "median", "max")]
            shown.add_row(row["name"], *(f"{number:.2f}" for number in numbers))
        console.print(shown)
    result: dict[str, Any] = {"machine": {"cores": os.cpu_count(), "torch": torch.__version__}, "bandwidths": rows}
    if arguments.step_blocks:
        result["background"] = one = background(arguments)
        console.print(
            f"background save of {one['checkpoint_gib']:.2f} GiB in {statistics.median(one['save']):.1f} s: blocked "
            f"{statistics.median(one['blocked']):.3f} s ({one['blocked_share_of_a_step']:.0%} of a step of "
            f"{one['step_seconds']:.3f} s); {arguments.block_steps} steps with it took {one['slowdown_min']:+.1%} (best), "
            f"{one['slowdown_median']:+.1%} (median of pairs); "
            f"memory peak {one['extra_gib']:+.2f} GiB"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
