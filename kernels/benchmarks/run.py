"""Benchmarks of the memory operations against their peers in the same run: ``make bench``.

Each contender runs in turn, round by round, so a machine whose speed drifts drifts for all of them; the table gives the minimum and
median of the rounds and the ratio of the medians. Results go to the terminal and to a JSON file.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
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

from megamem_kernels.ngram_hash.op import ngram_hash
from megamem_kernels.ngram_hash.reference import ngram_hash_reference
from megamem_kernels.row_update import lazy_adam_, rowwise_adagrad_
from megamem_kernels.segment_sum import segment_sum


@dataclass
class Arguments:
    """Measure the memory operations of megamem."""

    rounds: int = 7
    """Counted rounds; the first round before them is not counted."""
    rows: int = 1_000_000
    """Rows of the table."""
    width: int = 64
    """Width of a row."""
    lookups: int = 65_536
    """Row ids of a step, Zipf(1.05) distributed."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/bench/bench.json")
    """Where the JSON goes."""


@dataclass(frozen=True)
class Case:
    """An operation, with its contenders by name; the first one is ours, the others are its peers."""

    name: str
    contenders: dict[str, Callable[[], Any]]


def zipf_ids(rows: int, count: int, generator: np.random.Generator) -> torch.Tensor:
    """``count`` ids below ``rows`` whose frequencies fall as rank^-1.05, scattered over the table."""
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -1.05
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), generator.random(count)).clip(max=rows - 1)
    return torch.from_numpy(generator.permutation(rows)[ranks])


def hash_case(generator: np.random.Generator) -> Case:
    """16 rows per token; the reference is a loop in Python, timed on a part of the tokens and scaled."""
    tokens = generator.integers(0, 32_000, (8, 2048))
    documents = np.zeros_like(tokens)
    constants = {
        "multipliers": np.array([3, 5, 7], dtype=np.int64) * 10**9 + 1,
        "primes": generator.integers(500_000, 600_000, (2, 8)),
        "offsets": np.arange(16, dtype=np.int64) * 600_000,
        "pad_id": 2,
    }
    part = (slice(0, 1), slice(0, 256))

    def loop() -> float:
        began = time.perf_counter()
        ngram_hash_reference(tokens[part], documents[part], **constants)
        return (time.perf_counter() - began) * tokens.size / tokens[part].size

    return Case(
        "n-gram hash, 16k tokens x 16 rows",
        {"op": lambda: ngram_hash(tokens, documents, **constants), "reference loop (scaled)": loop},
    )


def update_cases(arguments: Arguments, generator: np.random.Generator) -> list[Case]:
    """Gather, gradient and update of one step, beside ``nn.Embedding(sparse=True)`` with ``SparseAdam``."""
    rows, width = arguments.rows, arguments.width
    ids = zipf_ids(rows, arguments.lookups, generator)
    unique, inverse = torch.unique(ids, return_inverse=True)
    gradient = torch.from_numpy(generator.standard_normal((len(ids), width), dtype=np.float32))
    table = torch.zeros(rows, width)
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    last, accumulator = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    embedding = torch.nn.Embedding(rows, width, sparse=True)
    sparse_adam = torch.optim.SparseAdam(embedding.parameters(), lr=1e-3)
    step = [0]

    def working_set_step(update: Callable[[torch.Tensor], None]) -> None:
        mine, where = torch.unique(ids, return_inverse=True)
        working_set = table.index_select(0, mine).requires_grad_()
        torch.nn.functional.embedding(where, working_set).backward(gradient)
        assert working_set.grad is not None
        update(working_set.grad)

    def adam(summed: torch.Tensor) -> None:
        step[0] += 1
        lazy_adam_(
            table, first, second, last, unique, summed,
            lr=1e-3, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0, step=step[0],
        )  # fmt: skip

    def adagrad(summed: torch.Tensor) -> None:
        rowwise_adagrad_(table, accumulator, unique, summed, lr=1e-3, epsilon=1e-8, weight_decay=0.0)

    def peer() -> None:
        sparse_adam.zero_grad()
        embedding(ids).backward(gradient)
        sparse_adam.step()

    shape = f"{rows / 1e6:g}M x {width}, {arguments.lookups} Zipf ids, {len(unique)} unique"
    return [
        Case(
            f"plan + fetch + backward + update, {shape}",
            {
                "working set + lazy Adam": lambda: working_set_step(adam),
                "working set + row-wise Adagrad": lambda: working_set_step(adagrad),
                "nn.Embedding + SparseAdam": peer,
            },
        ),
        Case(
            f"sum of {arguments.lookups} row gradients",
            {
                "segment_sum": lambda: segment_sum(gradient, inverse, len(unique)),
                "torch.sparse coalesce": lambda: torch.sparse_coo_tensor(
                    ids[None], gradient, (rows, width), check_invariants=False
                ).coalesce(),
            },
        ),
    ]


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in every round; a contender that returns a number has timed itself."""
    seconds: dict[str, list[float]] = {name: [] for name in case.contenders}
    for number in range(rounds + 1):
        for name, run in case.contenders.items():
            began = time.perf_counter()
            result = run()
            taken = result if isinstance(result, float) else time.perf_counter() - began
            if number:
                seconds[name].append(taken)
    return seconds


def main() -> None:
    """Run every case, print the table, write the JSON."""
    arguments = tyro.cli(Arguments)
    generator = np.random.default_rng(0)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}"
    table = Table("form", "min ms", "median ms", "median over ours", title=machine, title_justify="left")
    results: list[dict[str, Any]] = []
    for case in [hash_case(generator), *update_cases(arguments, generator)]:
        seconds = measure(case, arguments.rounds)
        ours = statistics.median(next(iter(seconds.values())))
        table.add_section()
        table.add_row(f"[bold]{case.name}")
        for name, values in seconds.items():
            low, middle = min(values), statistics.median(values)
            table.add_row(name, f"{low * 1e3:.2f}", f"{middle * 1e3:.2f}", f"{middle / ours:.2f}")
            results.append({"operation": case.name, "form": name, "seconds": values, "ratio": middle / ours})
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
