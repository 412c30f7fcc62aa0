"""``torchrun -m megamem_launch.plan.probes FILE FOLDER``: measures the ceilings of one rank while all ranks measure the same.

What :mod:`megamem_launch.plan.ceilings` starts. Rank 0 writes ``FILE``: plain data of :class:`RankCeilings`, a list of
:class:`CollectiveCeilings`, and memory of the process. Every number is the mean over the ranks of the best of several windows, in
which all of them work.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megamem.files import write_text
from megamem.memory.config import MemoryConfig, RowOptimizerConfig, StorageConfig
from megamem.memory.optimizers import build_row_optimizer
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.gpt import build_model
from megamem.observe.memory import rss
from megamem.observe.wire import sent_bytes
from megamem.parallel import groups as parallel_groups
from megamem.parallel.layout import Layout
from megamem_kernels.parallel import set_threads

MATMUL_ROWS = (16, 64, 256, 1024)
_MATMUL_WIDTH = 1024
_ELEMENTWISE_MIB = (1, 8, 64)
_WINDOWS, _WINDOW_SECONDS = 4, 0.08
_TABLE_ROWS, _ROW_WIDTH, _ROWS = 1 << 18, 128, 1 << 13
_MESSAGES = (1 << 14, 1 << 24)
"""Bytes of a small and a large message: what latency and bandwidth are told from."""


def measure(device: torch.device, disk: Path) -> dict[str, Any]:
    """All ceilings; the same on every rank. Collective over the world."""
    layer, expert = _overheads(device)
    compute: dict[str, Any] = {
        "ranks": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "layer_overhead_ms": 1e3 * layer,
        "expert_overhead_ms": 1e3 * expert,
    }
    for name, dtype in (("matmul_tflops_fp32", torch.float32), ("matmul_tflops_bf16", torch.bfloat16)):
        compute[name] = {str(rows): _matmul(rows, dtype, device) for rows in MATMUL_ROWS}
    compute["attention_tflops"] = _attention(device)
    compute["elementwise_gb_per_s"] = {str(mib): _elementwise(mib, device) for mib in _ELEMENTWISE_MIB}
    compute["copy_gb_per_s"] = _copy(device)
    before_kernels = rss()
    gather, update = _rows()
    kernels = rss() - before_kernels
    compute["gather_gb_per_s"], compute["row_update_gb_per_s"] = gather, update
    ranks = dist.get_world_size()
    collectives = [_collective(name, device) for name in _COLLECTIVES] if ranks > 1 else []
    write, read = _disk(disk)
    return {
        "compute": compute,
        "collectives": collectives,
        "kernels_mib": _mean(max(0, kernels) / 2**20),
        "disk_write_gb_per_s": write * ranks,
        "disk_read_gb_per_s": read * ranks,
    }


def _seconds(run: Callable[[], Any], device: torch.device, *, windows: int = _WINDOWS) -> float:
    """Seconds of one call, while all ranks call it: of each rank its best window, and the mean of them. Ranks that share a core
    are timed while they have it: how many take turns, the planner knows."""
    run()
    clock = time.process_time if _crowded() and device.type == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(windows):
        dist.barrier()
        _wait(device)
        began, calls = clock(), 0
        while (elapsed := clock() - began) < _WINDOW_SECONDS or not calls:
            run()
            _wait(device)
            calls += 1
        best = min(best, elapsed / calls)
    return _mean(best)


def _crowded() -> bool:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > len(os.sched_getaffinity(0))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _mean(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _matmul(rows: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.randn(rows, _MATMUL_WIDTH, device=device).to(dtype)
    b = torch.randn(_MATMUL_WIDTH, _MATMUL_WIDTH, device=device).to(dtype)
    return 2e-12 * rows * _MATMUL_WIDTH**2 / _seconds(lambda: a @ b.t(), device)


def _attention(device: torch.device) -> float:
    """Forward and backward, with a mask as packed documents need it, counted as three times ``4 s s q``."""
    batch, heads, length, width = 2, 8, 256, 64
    q, k, v = (torch.randn(batch, heads, length, width, device=device, requires_grad=True) for _ in range(3))
    hidden = torch.ones(length, length, device=device).tril().log()[None, None].expand(batch, 1, length, length)

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=hidden).sum().backward()

    return 12e-12 * batch * length * length * heads * width / _seconds(run, device)


def _elementwise(mib: int, device: torch.device) -> float:
    a, b = (torch.randn(mib << 18, device=device) for _ in range(2))
    return 3e-9 * a.nbytes / _seconds(lambda: a * b, device)


def _copy(device: torch.device) -> float:
    a, b = (torch.randn(1 << 24, device=device) for _ in range(2))
    return 2e-9 * a.nbytes / _seconds(lambda: b.copy_(a), device)


def _rows() -> tuple[float, float]:
    """GB/s of gathering rows from a host table, and of updating them."""
    set_threads(torch.get_num_threads())
    optimizer = build_row_optimizer(RowOptimizerConfig())
    spec = TableSpec("probe", _TABLE_ROWS, _ROW_WIDTH, (InitSegment(_ROW_WIDTH, 0.0),))
    table = OwnedTable.create(spec, seed=0, storage=StorageConfig(), state_fields=optimizer.state_fields(_ROW_WIDTH))
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randperm(_TABLE_ROWS, generator=generator)[:_ROWS].numpy()
    out = {"rows": torch.empty(_ROWS, _ROW_WIDTH)}
    gradient = torch.ones(_ROWS, _ROW_WIDTH)
    cpu, steps = torch.device("cpu"), itertools.count(1)
    gather = 2 * out["rows"].nbytes / _seconds(lambda: table.gather(ids, out), cpu)
    moved = _ROWS * (2 * table.record_bytes + 4 * _ROW_WIDTH)
    update = moved / _seconds(lambda: optimizer.update(table, ids, gradient, lr=1e-3, step=next(steps)), cpu)
    table.close()
    return gather / 1e9, update / 1e9


def _overheads(device: torch.device) -> tuple[float, float]:
    """Seconds of a layer, and of an expert, forward and backward, with 16 tokens of width 64."""
    layers, experts = 4, 4
    seconds = []
    for moe in (MoEConfig(), MoEConfig(layers=list(range(layers)), num_experts=experts, ffn_hidden_size=64)):
        model = ModelConfig(
            num_layers=layers,
            hidden_size=64,
            ffn_hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=128,
            moe=moe,
        )
        seconds.append(_train_seconds(model, device) / layers)
    return seconds[0], max(0.0, seconds[1] - seconds[0]) / experts


def _train_seconds(model: ModelConfig, device: torch.device) -> float:
    with _training(model, device, batch=1, length=16) as run:
        return _seconds(run, device)


@contextlib.contextmanager
def _training(model: ModelConfig, device: torch.device, *, batch: int, length: int) -> Iterator[Callable[[], None]]:
    """Forward and backward of a model on one micro-batch, gradients accumulating."""
    groups = parallel_groups.initialize(Layout(dist.get_world_size()), seed=1)
    try:
        gpt = build_model(
            model,
            MemoryConfig(),
            groups=groups,
            seq_length=length,
            dtype=torch.float32,
            seed=1,
            sequence_parallel=False,
        )
        tokens = torch.randint(0, model.vocab_size, (batch, length), device=device)
        positions = torch.arange(length, device=device).expand(batch, -1)
        yield lambda: gpt(tokens, positions, None, labels=tokens).sum().backward()
    finally:
        parallel_groups.destroy()


def _collective(name: str, device: torch.device) -> dict[str, Any]:
    """Latency and bandwidth by the times of a small and of a large message."""
    small, large = (_COLLECTIVES[name](nbytes, device) for nbytes in _MESSAGES)
    ranks = dist.get_world_size()
    sent = [sent_bytes(name, nbytes, ranks) for nbytes in _MESSAGES]
    bandwidth = (sent[1] - sent[0]) / max(large - small, 1e-9)
    return {
        "operation": name,
        "ranks": ranks,
        "latency_us": 1e6 * max(0.0, small - sent[0] / bandwidth),
        "gb_per_s": bandwidth / 1e9,
    }


def _all_reduce(nbytes: int, device: torch.device) -> float:
    tensor = torch.zeros(nbytes // 4, device=device)
    return _timed(lambda: dist.all_reduce(tensor), device)


def _all_gather(nbytes: int, device: torch.device) -> float:
    part = torch.zeros(nbytes // 4, device=device)
    whole = part.new_empty(len(part) * dist.get_world_size())
    return _timed(lambda: dist.all_gather_into_tensor(whole, part), device)


def _reduce_scatter(nbytes: int, device: torch.device) -> float:
    ranks = dist.get_world_size()
    part = torch.zeros(nbytes // 4 // ranks, device=device)
    whole = part.new_zeros(len(part) * ranks)
    return _timed(lambda: dist.reduce_scatter_tensor(part, whole), device)


def _all_to_all(nbytes: int, device: torch.device) -> float:
    ranks = dist.get_world_size()
    tensor = torch.zeros(nbytes // 4 // ranks * ranks, device=device)
    out = torch.empty_like(tensor)
    return _timed(lambda: dist.all_to_all_single(out, tensor), device)


def _send(nbytes: int, device: torch.device) -> float:
    """Around the ring, all ranks at once, as the stages of a pipeline do."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensor = torch.zeros(nbytes // 4, device=device)
    out = torch.empty_like(tensor)

    def run() -> None:
        pair = [
            dist.P2POp(dist.isend, tensor, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, out, (rank - 1) % ranks),
        ]
        for request in dist.batch_isend_irecv(pair):
            request.wait()

    return _timed(run, device)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """As :func:`_seconds`, but of equally many calls on all ranks, which wait for each other within."""
    run()
    best = float("inf")
    for _ in range(_WINDOWS):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(5):
            run()
        _wait(device)
        best = min(best, (time.perf_counter() - began) / 5)
    return _mean(best)


_COLLECTIVES: dict[str, Callable[[int, torch.device], float]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "send": _send,
}


def _disk(folder: Path) -> tuple[float, float]:
    """GB/s of writing a file with its flush, and of reading it after the page cache has forgotten it."""
    block, blocks = bytes(os.urandom(1 << 20)) * 8, 16
    path = folder / f".megamem-probe-{dist.get_rank()}"
    try:
        dist.barrier()
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = len(block) * blocks / (time.perf_counter() - began)
        dist.barrier()
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while file.read(len(block)):
                pass
            read = len(block) * blocks / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)
    return _mean(written) / 1e9, _mean(read) / 1e9


def main(argv: list[str]) -> int:
    """Measure, and let rank 0 write."""
    file, folder = argv
    parallel_groups.init_distributed()
    try:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        found = measure(device, Path(folder))
        if dist.get_rank() == 0:
            write_text(Path(file), json.dumps(found))
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
