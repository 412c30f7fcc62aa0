"""One rank of a profile: build the run, train through the windows, and tell rank 0 what was measured."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist

from megamem import __version__
from megamem.errors import ConfigError
from megamem.files import write_text
from megamem.observe.accounting import largest
from megamem.observe.allocations import add_up, kinds_of
from megamem.observe.flops import forward_flops, recompute_flops, training_flops
from megamem.observe.phases import phases
from megamem.observe.profiler import Measured, StepProfiler, Windows, bubble, step_times
from megamem.observe.wire import WIRES, WireCounter
from megamem.parallel import groups as parallel_groups
from megamem.train.trainer import Trainer
from megamem_launch.compose import Parts, build_parts, check_ranks_agree, check_start, open_data, precision_of
from megamem_launch.config import RunConfig
from megamem_launch.observer import RunObserver
from megamem_launch.profile.options import SCRATCH, Options, scratch_config
from megamem_launch.run import make_trainer
from megamem_launch.saver import Saver
from megamem_launch.summary import count_parameters
from megamem_launch.validate import validate

Profile = dict[str, Any]


class Recorder(RunObserver):
    """The trainer's observer of a profile: hands every step's numbers on, on every rank, and keeps no journal."""

    def __init__(self, profiler: StepProfiler) -> None:
        self._active = False  # none of the run's own journals
        self._profiler = profiler

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take the seconds by phase."""
        self._profiler.observe(metrics)


def profile_rank(config: RunConfig, options: Options) -> Profile | None:
    """Profile ``config`` as the rank that the environment names; ``profile.json`` and traces are in ``options.out``
    afterwards. The profile on rank 0, None elsewhere. Errors as those of :func:`megamem_launch.run.pretrain`.
    """
    windows = Windows(options.warmup, options.steps, options.traced)
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.nsys and device.type != "cuda":
        raise ConfigError(
            "--nsys records a CUDA device, and there is none here; leave it out for torch.profiler's trace"
        )
    # With steps to look ahead to, up to the last one that is measured.
    steps = windows.total(device) + config.memory.prefetch_depth
    scratch = scratch_config(config, options.out, steps)
    layout = validate(scratch, int(os.environ.get("WORLD_SIZE", "1")))
    data = open_data(scratch)
    check_start(scratch, data)
    options.out.mkdir(parents=True, exist_ok=True)
    parallel_groups.init_distributed()
    try:
        groups = parallel_groups.initialize(layout, seed=scratch.train.seed)
        check_ranks_agree(scratch, data)
        with contextlib.closing(build_parts(scratch, data, groups)) as parts:
            own = _train(parts, options, windows)
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
            parameters = count_parameters(parts)
            if rank:
                return None
            interval = config.checkpoint.interval
            profile = _summarize(parts, options, ranks, parameters, interval) | {"name": config.name}
            write_text(options.out / "profile.json", json.dumps(profile, indent=1) + "\n")
            return profile
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"rank {rank} ran out of memory ({str(error).partition('. ')[0]}); lower train.micro_batch_size or "
            "data.seq_length, or raise the sizes of parallel"
        ) from error
    finally:
        parallel_groups.destroy()
        dist.destroy_process_group()
        if rank == 0:
            shutil.rmtree(options.out / SCRATCH, ignore_errors=True)


def _train(parts: Parts, options: Options, windows: Windows) -> dict[str, Any]:
    profiler = StepProfiler(
        windows,
        marks=phases,
        counter=WireCounter(parallel_groups.wires(parts.groups, parts.memory.links.groups)),
        device=parts.groups.device,
        out=options.out,
        rank=parts.groups.coordinates.rank,
        nsys=options.nsys,
    )
    observer = Recorder(profiler)
    saved: dict[str, float] = {}

    def save(step: int) -> None:
        """Called by the trainer once, after the last step."""
        if options.checkpoint:
            saved.update(_time_checkpoint(Saver(parts, observer, trainer), step))

    trainer: Trainer = make_trainer(parts, observer, save, after_step=profiler.after_step)
    with contextlib.closing(profiler):
        profiler.begin()
        trainer.run()
    return {
        "rank": asdict(parts.groups.coordinates),
        "host": platform.node(),
        "measured": asdict(profiler.measured),
        "memory": _memory(parts, profiler.measured),
        "exchange_bytes": parts.memory.stats["bytes_sent"],
        "checkpoint": saved,
    }


def _time_checkpoint(saver: Saver, step: int) -> dict[str, float]:
    """Seconds in which training waits, and seconds until the checkpoint is on the disk."""
    began = time.perf_counter()
    saver.save(step)
    blocked = time.perf_counter() - began
    saver.wait()
    return {"blocked_seconds": blocked, "total_seconds": time.perf_counter() - began}


def _memory(parts: Parts, measured: Measured) -> dict[str, int]:
    """Peak bytes by kind on the device; on a CPU, of the process."""
    dense = parts.zero.memory()
    for table in parts.memory.tables.values():
        for place, size in table.resident_bytes().items():
            dense[f"tables_{place}"] = dense.get(f"tables_{place}", 0) + size
    there = kinds_of(dense, ["device"] if parts.groups.device.type == "cuda" else ["device", "host"])
    static = {kind: there.get(kind, 0) for kind in ("parameters", "optimizer", "tables")}
    static["buffers"] = parts.memory.buffer_bytes
    gradients = there.get("gradients", 0)
    return add_up(static, measured.peak, gradients=gradients, held=measured.held_bytes, free=measured.free_bytes)


def _summarize(parts: Parts, options: Options, ranks: list[Any], parameters: dict[str, int], interval: int) -> Profile:
    config, layout = parts.config, parts.groups.layout
    measured = [rank["measured"] for rank in ranks]
    times = step_times(measured[0]["step_seconds"])
    tokens = config.train.global_batch_size * config.data.seq_length
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * layout.dp)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": layout.world_size,
        "layout": {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "ep", "cp", "dp")},
        "batch": {
            "global": config.train.global_batch_size,
            "micro": config.train.micro_batch_size,
            "micro_batches": micro_batches,
            "seq_length": config.data.seq_length,
        },
        "zero_stage": config.optimizer.zero_stage,
        "recompute": config.train.recompute,
        "precision": precision_of(config),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "versions": {"megamem": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "parameters": parameters,
        "windows": {"warmup": options.warmup, "measured": options.steps, "traced": options.traced},
        "step_seconds": times,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / times["mean"],
        "flops": _flops(config, options, tokens / times["mean"], layout.world_size),
        "breakdown": _breakdown(measured),
        "bubble": [bubble(m["breakdown"], pp=layout.pp, vpp=layout.vpp, micro_batches=micro_batches) for m in measured],
        "wires": _wires(measured),
        "exchange_bytes": [rank["exchange_bytes"] for rank in ranks],
        "memory": {
            "ranks": [rank["memory"] for rank in ranks],
            "largest": largest([rank["memory"] for rank in ranks]),
            "held_bytes": [m["held_bytes"] for m in measured],
            "allocated_bytes": [m["allocated_bytes"] for m in measured],
            "reached_in": [m["peak"]["phase"] for m in measured],
        },
        "checkpoint": _checkpoint(ranks, interval),
        "ranks": [rank["rank"] | {"host": rank["host"]} for rank in ranks],
        "traces": [m["trace"] for m in measured if m["trace"]],
        "snapshots": [m["snapshot"] for m in measured if m["snapshot"]],
    }


def _flops(config: RunConfig, options: Options, tokens_per_second: float, world: int) -> dict[str, Any]:
    model, memory, length = config.model, config.memory, config.data.seq_length
    per_token = training_flops(model, memory, length)
    again = recompute_flops(model, memory, length, config.train.recompute)
    achieved = per_token * tokens_per_second / world
    flops: dict[str, Any] = {
        "forward_per_token": forward_flops(model, memory, length),
        "training_per_token": per_token,
        "recompute_per_token": again,
        "per_rank_per_second": achieved,
        "peak_tflops": options.peak_tflops,
        "peak_source": options.peak_source,
    }
    if options.peak_tflops:
        flops["mfu"] = achieved / (options.peak_tflops * 1e12)
        flops["hfu"] = flops["mfu"] * (per_token + again) / per_token
    return flops


def _breakdown(measured: list[Any]) -> dict[str, Any]:
    """Seconds per step by phase of every rank, and by how much they miss the step."""
    return {
        "ranks": [m["breakdown"] for m in measured],
        "step_seconds": [m["breakdown_wall"] for m in measured],
        "sum_over_step": [sum(m["breakdown"].values()) / m["breakdown_wall"] for m in measured],
    }


def _wires(measured: list[Any]) -> dict[str, Any]:
    """By wire: bytes that a rank sends per step, on average and the most of any rank, and the operations."""
    wires: dict[str, Any] = {}
    for wire in WIRES:
        sent = [sum(traffic["sent"] for traffic in m["wires"].get(wire, {}).values()) for m in measured]
        operations = {
            name: {
                "calls": max(m["wires"].get(wire, {}).get(name, {"calls": 0})["calls"] for m in measured),
                "bytes": sum(m["wires"].get(wire, {}).get(name, {"sent": 0})["sent"] for m in measured) / len(measured),
            }
            for name in sorted({name for m in measured for name in m["wires"].get(wire, {})})
        }
        if operations:
            wires[wire] = {
                "mean_bytes": sum(sent) / len(sent), "max_bytes": max(sent), "ranks": sent, "operations": operations
            }  # fmt: skip
    return wires


def _checkpoint(ranks: list[Any], interval: int) -> dict[str, float]:
    """The slowest rank's times; with the configured interval, what a checkpoint costs per step."""
    times = [rank["checkpoint"] for rank in ranks if rank["checkpoint"]]
    if not times:
        return {}
    slowest = {name: max(time[name] for time in times) for name in times[0]}
    return slowest | ({"blocked_seconds_per_step": slowest["blocked_seconds"] / interval} if interval else {})
