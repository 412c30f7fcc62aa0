"""What a host table costs a training step: two ranks, a 30 M-parameter backbone, two Engram layers, a 4 GiB table.

The peer is the same model whose Engram modules read a constant in place of rows: same projections, gates and convolutions, no
table, no exchange. Both take turns in blocks of steps in the same processes, so that a machine whose speed drifts drifts for
both. Prefetching is measured on and off. Prints the median step, the overhead and the stall, and writes JSON::

    python kernels/benchmarks/step_overhead.py --gib 4 --out runs/bench/step_overhead.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from training import make_trainer, run_steps

from megamem.memory.config import EngramConfig, MemoryConfig, RowOptimizerConfig
from megamem.memory.engine import MemoryEngine
from megamem.memory.streams import Stream
from megamem.models.config import ModelConfig
from megamem.parallel import groups as parallel_groups
from megamem.parallel.layout import Layout
from megamem.testing.distributed import run_distributed
from megamem_kernels.parallel import set_threads

LAYERS = [1, 4]
HEADS, ORDERS, WIDTH = 8, [2, 3], 64


@dataclass
class Arguments:
    """Measure the overhead of host tables on a training step."""

    gib: float = 4.0
    """Size of the tables, fp32 rows of both layers together."""
    ranks: int = 2
    """Processes, one thread each."""
    seq_length: int = 512
    """Tokens of a sequence; two sequences per rank and step."""
    blocks: int = 4
    """Times that each form has its turn."""
    block_steps: int = 3
    """Measured steps of a turn; one more before them is not counted."""
    optimizer: str = "lazy_adam"
    """Row optimizer."""
    hidden_size: int = 512
    """Of the backbone; 512 makes 30 M parameters."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/bench/step_overhead.json")
    """Where the JSON goes."""


class _Constant:
    """Rows that are no rows: the same leaf for every lookup, whose gradient is computed and forgotten."""

    def __init__(self, widths: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        self._rows = {
            name: torch.full((*shapes[name.removesuffix(".table")], width), 0.02, requires_grad=True)
            for name, width in widths.items()
        }

    def micro(self, i: int) -> _Constant:
        del i
        return self

    def lookup(self, table: str, stream: str) -> Tensor:
        del stream
        self._rows[table].grad = None
        return self._rows[table]


class ConstantMemory(MemoryEngine):
    """An engine without tables, for models whose modules read rows nevertheless."""

    def __init__(self, streams: list[Stream], shape: tuple[int, ...]) -> None:
        super().__init__([], memory=MemoryConfig(prefetch_depth=0), seed=1, device="cpu")
        widths = {spec.name: spec.width for stream in streams for spec in stream.tables}
        self._constant = _Constant(widths, {stream.name: shape for stream in streams})
        self._taken: Any = None

    def take(self, ticket: Any) -> Any:
        self._taken = super().take(ticket)
        return self._constant

    def return_gradients(self, memory: Any) -> Any:
        del memory
        return super().return_gradients(self._taken)


def peak_rss() -> int:
    """Peak resident set of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def rss() -> int:
    """Resident set of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def measure(arguments: Arguments) -> dict[str, Any]:
    """One rank: seconds of every counted step by form, and memory."""
    torch.set_num_threads(1)
    set_threads(1)
    model = ModelConfig(
        num_layers=8,
        hidden_size=arguments.hidden_size,
        ffn_hidden_size=3 * arguments.hidden_size,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=8192,
    )
    rows = int(arguments.gib * 2**30 / 4 / WIDTH / len(LAYERS) / (HEADS * len(ORDERS)))
    engram = EngramConfig(layers=LAYERS, heads=HEADS, orders=ORDERS, width=WIDTH, rows_per_head=rows)
    optimizer = RowOptimizerConfig(name=arguments.optimizer)  # type: ignore[arg-type]
    groups = parallel_groups.initialize(Layout(world_size=arguments.ranks), seed=1)
    steps = 10_000
    shape = (arguments.seq_length, 1, HEADS * len(ORDERS))
    common: dict[str, Any] = {
        "seq_length": arguments.seq_length,
        "micro_batches": 2,
        "steps": steps,
        "disk_root": Path(tempfile.gettempdir()),
        "groups": groups,
    }
    memory = {
        "no table": MemoryConfig(engram=engram),
        "prefetch on": MemoryConfig(engram=engram, optimizer=optimizer, prefetch_depth=1),
    }
    trainers = {
        "no table": make_trainer(
            model, memory["no table"], **common, engine_for=lambda streams: ConstantMemory(streams, shape)
        )
    }
    before = rss()
    trainers["prefetch on"] = make_trainer(model, memory["prefetch on"], **common)
    engine = trainers["prefetch on"][0].memory
    tables = sum(sum(table.resident_bytes().values()) for table in engine.tables.values())
    # Prefetching off is the same trainer and the same tables, with nothing submitted ahead.
    seconds: dict[str, list[float]] = {"no table": [], "prefetch on": [], "prefetch off": []}
    stalls: dict[str, list[float]] = {name: [] for name in seconds}
    rows: dict[str, dict[str, float]] = {}
    for _ in range(arguments.blocks):
        for form in seconds:
            trainer, recorder = trainers["no table" if form == "no table" else "prefetch on"]
            trainer.memory_config.prefetch_depth = int(form == "prefetch on")
            for _ in run_steps(trainer, arguments.block_steps + 1):
                pass
            trainer.memory.synchronize()
            torch.distributed.barrier()
            for metrics in recorder.steps[-arguments.block_steps :]:
                seconds[form].append(metrics["step_seconds"])
                stalls[form].append(metrics["stall_seconds"])
                rows[form] = {key: metrics[key] for key in ("unique_ratio", "patch_ratio", "rows_received")}
    working = sum(slot.rows.nbytes for slot in engine._slots)
    return {
        "seconds": seconds,
        "stall_seconds": stalls,
        "table_bytes": tables,
        "working_set_bytes": working,
        "rss_growth": peak_rss() - before,
        "rows": rows["prefetch on"],
        "parameters": sum(parameter.numel() for parameter in trainers["no table"][0].model.parameters()),
    }


def main() -> None:
    """Run the ranks, print the table, write the JSON."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = tyro.cli(Arguments)
    results = run_distributed(measure, arguments.ranks, arguments, timeout=3600.0)
    first = results[0]
    base = first["seconds"]["no table"]
    table = Table("form", "min s", "median s", "overhead of median", "stall, share of the step")
    summary: dict[str, Any] = {}
    for form, values in first["seconds"].items():
        middle, stall = statistics.median(values), sum(first["stall_seconds"][form]) / sum(values)
        overhead = middle / statistics.median(base) - 1
        summary[form] = {"min": min(values), "median": middle, "overhead": overhead, "stall": stall}
        table.add_row(form, f"{min(values):.3f}", f"{middle:.3f}", f"{overhead:+.1%}", f"{stall:.2%}")
    Console().print(
        f"{first['parameters'] / 1e6:.0f} M parameters, {arguments.ranks} ranks, tables and state "
        f"{sum(r['table_bytes'] for r in results) / 2**30:.1f} GiB, unique ratio {first['rows']['unique_ratio']:.2f}, "
        f"patch ratio {first['rows']['patch_ratio']:.3f}; growth of the resident set over tables and working sets: "
        + ", ".join(f"{r['rss_growth'] / (r['table_bytes'] + r['working_set_bytes']):.3f}" for r in results)
    )
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    body = {"arguments": {**vars(arguments), "out": str(arguments.out)}, "summary": summary, "ranks": results}
    arguments.out.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
