"""Closing measurements of a run: ``summary.json`` and the gates over a text sample."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamem import __version__
from megamem.batch import StepBatch
from megamem.files import write_text
from megamem.models.engram import Engram
from megamem.observe.journal import read_journal
from megamem.train.step import StepRunner
from megamem.train.trainer import Trainer
from megamem_launch.compose import Parts, precision_of
from megamem_launch.config import RunConfig

_GATE_TOKENS = 192  # tokens of the heat-map: about one screen of text


def count_parameters(parts: Parts) -> dict[str, int]:
    """Parameters of the whole model by kind, each counted once: ``dense``, ``experts``, ``tables``."""
    layout = parts.groups.layout
    counts = torch.zeros(3, dtype=torch.float64)
    for entry in parts.entries:
        local = entry.tensor[entry.rows].numel()
        if entry.is_copy:
            continue
        if entry.is_expert:
            counts[1] += local * layout.ep * layout.etp / layout.stage_size
        else:
            counts[0] += local / (layout.dp * layout.cp * (1 if entry.tp_dim is not None else layout.tp))
    for table in parts.memory.tables.values():
        counts[2] += (table.stop - table.start) * table.spec.width
    dist.all_reduce(counts)
    dense, experts, tables = (round(x) for x in counts.tolist())
    return {"dense": dense, "experts": experts, "tables": tables, "total": dense + experts + tables}


def table_usage(parts: Parts) -> dict[str, float]:
    """Share of the rows of every table of the model that were ever updated. Collective over the world."""
    local = parts.memory.table_usage()
    counts = {name: table.stop - table.start for name, table in parts.memory.tables.items()}
    owned = {name: (usage * counts[name], counts[name]) for name, usage in local.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, owned)
    used: dict[str, float] = {}
    rows: dict[str, int] = {}
    for shard in gathered:
        for name, (touched, count) in shard.items():
            used[name] = used.get(name, 0.0) + touched
            rows[name] = rows.get(name, 0) + count
    return {name: used[name] / max(rows[name], 1) for name in sorted(used)}


def write_summary(parts: Parts, trainer: Trainer) -> None:
    """Write ``summary.json``. Collective over the world; rank 0 writes."""
    config, progress = parts.config, trainer.progress
    summary: dict[str, Any] = {
        "name": config.name,
        "steps": progress.step,
        "tokens_seen": progress.tokens_seen,
        "skipped_steps": progress.skipped_steps,
        "validation_loss": dict(progress.evaluations),
        "parameters": count_parameters(parts),
        **environment(config),
    }
    if dist.get_rank() == 0:
        summary.update(_from_journal(config.run_dir / "journal.jsonl"))
        write_text(config.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


def _from_journal(path: Path) -> dict[str, Any]:
    """Throughput and traffic of the steps; medians, so that a checkpoint or a busy machine does not move them. And the memory
    of the busiest rank by part and place, as the last start added it up."""
    entries = read_journal(path)
    steps = [entry for entry in entries if entry["kind"] == "step"]

    def values(name: str) -> list[float]:
        return [float(entry[name]) for entry in steps if isinstance(entry.get(name), int | float)]

    measured: dict[str, Any] = {}
    for entry in entries:
        if entry["kind"] == "accounting":
            measured["accounted_memory_bytes"] = entry["largest"]
    for key, name in (("tokens_per_second", "tokens_per_second"), ("step_seconds", "step_seconds")):
        if values(name):
            measured[key] = statistics.median(values(name))
    lookups, unique = sum(values("lookups")), sum(values("unique_rows"))
    if lookups:
        measured["unique_row_ratio"] = unique / lookups
    if values("stall_seconds") and sum(values("step_seconds")):
        measured["stall_share"] = sum(values("stall_seconds")) / sum(values("step_seconds"))
    if values("memory_bytes"):
        measured["peak_memory_bytes"] = max(values("memory_bytes"))
    return measured


def environment(config: RunConfig) -> dict[str, Any]:
    """What a run is trained with: ranks, precision, device, versions."""
    return {
        "world_size": dist.get_world_size(),
        "precision": precision_of(config),
        "device": _device_name(),
        "versions": {"megamem": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"


def gate_sample(parts: Parts, runner: StepRunner) -> dict[str, Any] | None:
    """Gates of every Engram layer over the beginning of the validation text, for the report's heat-map.

    Tensor-, context- and pipeline-parallel ranks each see their part; the parts are put together by layer and position. None where
    the model has no Engram layer or the run has no validation split.
    """
    if parts.validation is None or not parts.config.memory.engram.layers:
        return None
    batch = parts.validation.batch(0)
    unit = max(1, parts.groups.layout.pp)
    sample = StepBatch(step=batch.step, micro_batches=batch.micro_batches[:unit])
    seen: list[tuple[int, int, list[float]]] = []
    modules = [module for module in parts.model.modules() if isinstance(module, Engram)]
    for module in modules:
        module.gate_observer = _observer(seen, module.layer, parts.groups.coordinates.slice)
    try:
        memory = parts.memory.take(parts.memory.submit(sample, train=False))
        runner.run(sample, memory, train=False)
        parts.memory.release(memory)
    finally:
        for module in modules:
            module.gate_observer = None
    mine = seen if parts.groups.coordinates.dp == 0 else []
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    layers: dict[int, dict[int, list[float]]] = {}
    for part in gathered:
        for layer, place, gates in part:
            layers.setdefault(layer, {}).setdefault(place, gates)
    order = sorted(layers)
    values = [[g for place in sorted(layers[layer]) for g in layers[layer][place]][:_GATE_TOKENS] for layer in order]
    tokens = sample.micro_batches[0].tokens[0, :_GATE_TOKENS].tolist()
    return {"tokens": [parts.data.tokenizer.piece(token) for token in tokens], "layers": order, "gates": values}


def _observer(seen: list[tuple[int, int, list[float]]], layer: int, place: int) -> Callable[[torch.Tensor], None]:
    """Keeps the gates, ``[s / slices, b, 1]``, of the first sequence of the first micro-batch."""

    def observe(gates: torch.Tensor) -> None:
        if not any(entry[0] == layer for entry in seen):
            seen.append((layer, place, [round(float(g), 4) for g in gates[:, 0, 0].cpu()]))

    return observe
