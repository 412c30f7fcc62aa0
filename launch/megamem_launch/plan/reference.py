"""A reference model, trained on random tokens: what process, allocator and whole steps take beside what can be counted.

:mod:`megamem_launch.plan.ceilings` trains it with every number of ranks that it measures. The planner counts the same run from
the ceilings just measured; what the run took more or less is told of the machine, once for all layouts:

- ``efficiency``: share of the rates of compute at which a counted step would take as long as the real one,
- ``fragmentation``: with which the planned peak would be the real one,
- ``process_mib``: what training a model of next to no size takes beside what it holds: all that is imported before it is built and
  while it trains.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megamem.errors import ConfigError
from megamem_data.prepared import Manifest, describe_file
from megamem_data.shards import ShardWriter, token_dtype
from megamem_launch.cluster import Cluster
from megamem_launch.config import RunConfig, load_config, save_config
from megamem_launch.plan.hardware import HardwareConfig
from megamem_launch.plan.search import Plan, plan
from megamem_launch.torchrun import run_ranks

WARM_UP = 2
"""Steps that are slower than others, as kernels compile and heaps grow."""
_STEPS = 8
_MICRO_BATCHES = 2
_DOCUMENT = 256


@dataclass(frozen=True, slots=True)
class Reference:
    """What training the reference model told."""

    efficiency: float
    process_mib: float
    fragmentation: float


def run_layout(config: RunConfig, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank of :mod:`megamem_launch.plan.rank` wrote about a run of ``config``; its files go to ``folder``.

    Raises ConfigError where a rank fails.
    """
    save_config(config, folder / "config.yaml")
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    failure = run_ranks(ranks, "megamem_launch.plan.rank", [str(folder), str(folder / "config.yaml")])
    if failure is not None:
        why = f": {failure.text}" if failure.text else ""  # else a rank has said it
        raise ConfigError(f"training {config.name} on {ranks} ranks failed{why}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank-*.json"))]


def step_seconds(record: dict[str, Any]) -> float:
    """Median time of a step, from what a rank wrote."""
    return statistics.median(record["seconds"][WARM_UP:])


def train_reference(hardware: HardwareConfig, ranks: int, folder: Path) -> Reference:
    """Train and count the reference model on ``ranks`` ranks of this machine.

    Args:
        hardware: With the ceilings of as many ranks.
        ranks: All data-parallel.
        folder: For data and records; exists.
    """
    config = _config(ranks, 64, 64, 512, folder / "small")
    found = run_layout(config, ranks, folder / "small")
    process = max(rank["peak_bytes"] for rank in found) - _planned_peak(config, hardware, ranks, 0.0, 0.0, "host")
    process /= 2**20

    # Large enough for products to be most of a step, on a GPU as on a core.
    hidden, length, vocabulary = (2048, 2048, 32_768) if hardware.on_gpu else (384, 192, 6144)
    config = _config(ranks, hidden, length, vocabulary, folder / "large")
    found = run_layout(config, ranks, folder / "large")
    near = "device" if hardware.on_gpu else "host"
    peak = max(rank["reserved_bytes" if hardware.on_gpu else "peak_bytes"] for rank in found)
    # Both are linear in what is asked for, so two plans tell it.
    tight, loose = (_planned_peak(config, hardware, ranks, process, share, near) for share in (0.0, 1.0))
    fast, slow = (_planned_seconds(config, hardware, ranks, share) for share in (1.0, 0.5))
    compute = slow - fast
    waits = fast - compute
    return Reference(
        efficiency=compute / max(statistics.fmean(map(step_seconds, found)) - waits, compute / 2),
        process_mib=process,
        fragmentation=max(0.0, (peak - tight) / (loose - tight)),
    )


def plan_layout(config: RunConfig, hardware: HardwareConfig, ranks: int) -> tuple[Plan, dict[str, int]]:
    """The plan of ``ranks`` ranks on this machine, and by place the peak of a run of them that saves nothing."""
    cores = len(os.sched_getaffinity(0))
    cluster = Cluster(
        gpus_per_node=ranks if hardware.on_gpu else 0,
        ranks_per_node=ranks,
        cpus_per_node=max(cores, ranks),
        hardware=hardware,
    )
    told = plan(config, cluster, cores=cores)
    saving = max(rank.held.get("saving_host", 0) for rank in told.ranks)
    return told, {"host": told.peak("host") - saving, "device": told.peak("device")}


def _planned_peak(
    config: RunConfig, hardware: HardwareConfig, ranks: int, process: float, fragmentation: float, near: str
) -> int:
    hardware = copy.deepcopy(hardware)
    hardware.ceilings.process_mib, hardware.ceilings.fragmentation = process, fragmentation
    return plan_layout(config, hardware, ranks)[1][near]


def _planned_seconds(config: RunConfig, hardware: HardwareConfig, ranks: int, efficiency: float) -> float:
    hardware = copy.deepcopy(hardware)
    for entry in hardware.ceilings.compute:
        entry.efficiency = efficiency
    time = plan_layout(config, hardware, ranks)[0].time
    assert time is not None
    return time.seconds


def _config(ranks: int, hidden: int, length: int, vocabulary: int, folder: Path) -> RunConfig:
    folder.mkdir()
    micro = 2
    _write_tokens(folder / "data", vocabulary, length * micro * _MICRO_BATCHES * ranks * _STEPS)
    settings = {
        "base": "tiny",
        "name": "reference",
        "runs_dir": str(folder / "runs"),
        "model": {
            "num_layers": 6,
            "hidden_size": hidden,
            "ffn_hidden_size": 3 * hidden,
            "num_attention_heads": hidden // 32,
            "num_query_groups": hidden // 64,
            "vocab_size": vocabulary,
            "moe": {"layers": [4], "num_experts": 4, "router_topk": 2, "ffn_hidden_size": hidden},
        },
        "memory": {
            "engram": {"layers": [1], "heads": 4, "width": 32, "rows_per_head": 50 * hidden, "fold_tokens": False},
            "bank": {"units": []},
        },
        "data": {"path": str(folder / "data"), "seq_length": length},
        "train": {
            "steps": _STEPS,
            "global_batch_size": micro * _MICRO_BATCHES * ranks,
            "micro_batch_size": micro,
            "eval_batches": 0,
        },
        "checkpoint": {"interval": 0},
        "tracking": {"mlflow": False},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_config(folder / "base.yaml", [])


def _write_tokens(folder: Path, vocabulary: int, tokens: int) -> None:
    """Prepared data of random documents, without tokenizer or tree, for a step more than ``tokens``."""
    folder.mkdir()
    documents = 2 * tokens // _DOCUMENT
    writer = ShardWriter(folder, dtype=token_dtype(vocabulary), shard_tokens=documents * _DOCUMENT)
    ids = np.random.default_rng(0).integers(1, vocabulary, documents * _DOCUMENT)
    ids[_DOCUMENT - 1 :: _DOCUMENT] = 0
    writer.add(ids.astype(token_dtype(vocabulary)), np.full(documents, _DOCUMENT))
    shards = writer.close()
    Manifest(
        request={},
        vocab_size=vocabulary,
        eos_id=0,
        seed=0,
        validation_fraction=0.0,
        branching=0,
        levels=0,
        leaf_balance=0.0,
        counts={"documents": documents},
        documents=documents,
        tokens=documents * _DOCUMENT,
        shards=[asdict(shard) for shard in shards],
        files={file.name: describe_file(file) for file in sorted(folder.iterdir())},
    ).write(folder)
