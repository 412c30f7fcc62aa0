"""A table larger than the memory that the process may use: trains on the disk tier, with the losses of the host tier.

One process trains a small backbone with one Engram layer and prints the losses of all steps as hexadecimal numbers, the tokens per
second, and its peak memory::

    python kernels/benchmarks/disk_tier.py --tier host --gib 6
    python kernels/benchmarks/disk_tier.py --tier disk --gib 6 --limit-gib 2

With ``--limit-gib`` it first moves into a memory control group of that size (cgroup v1 or v2, needs root); page cache counts in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).parent))


@dataclass
class Arguments:
    """Train with a table on the host or disk tier."""

    tier: Literal["host", "disk"] = "disk"
    """Where rows and optimizer state live."""
    gib: float = 6.0
    """Size of the rows, fp32; their state comes on top."""
    optimizer: str = "rowwise_adagrad"
    """Row optimizer."""
    limit_gib: float = 0.0
    """Memory that the process may use; 0 for no limit."""
    cache_gib: float = 0.5
    """Cache of the disk tier."""
    path: str = "runs/bench/tables"
    """Directory of the disk tier's files."""
    steps: int = 12
    """Optimizer steps, of 4,096 tokens each; the first three do not count in the speed."""
    out: str = ""
    """JSON file for the results; empty for none."""


def limit_memory(gib: float) -> None:
    """Move this process into a new memory control group."""
    limit = str(int(gib * 2**30))
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory").is_dir()
    group = (root / "memory" if v1 else root) / f"megamem-bench-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(limit)
    (group / "cgroup.procs").write_text(str(os.getpid()))


def peak_bytes() -> int:
    """Peak resident set of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Train and print."""
    arguments = tyro.cli(Arguments)
    if arguments.limit_gib:
        limit_memory(arguments.limit_gib)
    from training import make_trainer, run_steps

    from megamem.memory.config import DiskConfig, EngramConfig, MemoryConfig, RowOptimizerConfig, StorageConfig
    from megamem.models.config import ModelConfig
    from megamem.parallel.groups import init_distributed

    init_distributed()
    width, heads = 64, 8
    memory = MemoryConfig(
        engram=EngramConfig(
            layers=[1],
            heads=heads,
            width=width,
            rows_per_head=int(arguments.gib * 2**30 / (4 * width) / (2 * heads)),
        ),
        optimizer=RowOptimizerConfig(name=arguments.optimizer),  # type: ignore[arg-type]
        storage=StorageConfig(tier=arguments.tier),
        disk=DiskConfig(cache_gib=arguments.cache_gib),
    )
    model = ModelConfig(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=704,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=8192,
    )
    began = time.perf_counter()
    trainer, recorder = make_trainer(
        model, memory, seq_length=512, micro_batches=8, steps=arguments.steps, disk_root=Path(arguments.path)
    )
    built = time.perf_counter() - began
    for _ in run_steps(trainer, arguments.steps):
        pass
    table = next(iter(trainer.memory.tables.values()))
    digest = hashlib.sha256()
    for low in range(0, table.stop, 1 << 16):
        for tensor in table.read(low, min(low + (1 << 16), table.stop)).values():
            digest.update(tensor.contiguous().numpy().tobytes())
    measured = recorder.steps[3:]
    result = {
        "tier": arguments.tier,
        "resident_gib": {kind: round(size / 2**30, 2) for kind, size in table.resident_bytes().items()},
        "limit_gib": arguments.limit_gib,
        "build_seconds": round(built, 1),
        "losses": [step["loss"].hex() for step in recorder.steps],
        "table_sha256": digest.hexdigest(),
        "tokens_per_second": round(statistics.median(step["tokens_per_second"] for step in measured)),
        "stall_share": sum(s["stall_seconds"] for s in measured) / sum(s["step_seconds"] for s in measured),
        "peak_resident_gib": round(peak_bytes() / 2**30, 2),
    }
    trainer.memory.close()
    print(json.dumps(result, indent=1))
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
