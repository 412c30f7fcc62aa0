"""The ``hardware`` section of a cluster description: what a node holds, and how fast it was found to be. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megamem.config import above_zero, at_least
from megamem.errors import ConfigError

CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(kw_only=True, slots=True)
class RankCeilings:
    """An entry of ``hardware.ceilings.compute``: what each rank gets, by the time that it has its cores, while ``ranks`` of a node
    work at once. More ranks than cores take turns, which is not in these rates."""

    ranks: int
    """Ranks of one node that compute at the same time."""
    threads: int = 1
    """Threads of each of them; 1 where a GPU computes."""
    matmul_tflops_fp32: dict[str, float] = field(default_factory=dict)
    """TFLOP/s of ``[n, k] x [k, k]`` in fp32, by ``n``, for matrices of some MiB."""
    matmul_tflops_bf16: dict[str, float] = field(default_factory=dict)
    """The same in bf16. One of the two must be there: that of the precision that is planned."""
    attention_tflops: float = 0.0
    """TFLOP/s of the core attention, forward and backward, masked scores counted; 0: as large products."""
    elementwise_gb_per_s: dict[str, float] = field(default_factory=dict)
    """GB/s read and written by an element-wise operation that allocates its result, by MiB of the result."""
    copy_gb_per_s: float = 0.0
    """GB/s read and written by a copy between large arrays that exist: what optimizers and buckets run at, and what other rates
    of memory are taken to be where they are 0. Must be set."""
    gather_gb_per_s: float = 0.0
    """GB/s of rows copied out of a large host table in random order, 512 bytes each."""
    row_update_gb_per_s: float = 0.0
    """GB/s of rows and state that the row optimizer reads and writes, in random order."""
    layer_overhead_ms: float = 0.0
    """Time of one transformer layer, forward and backward, with next to nothing to compute: the interpreter and launches."""
    expert_overhead_ms: float = 0.0
    """The same of one expert."""
    efficiency: float = 1.0
    """Share of the rates above that a step reaches: measured on a reference model, trained by as many ranks."""

    def __post_init__(self) -> None:
        at_least(self, 1, "ranks", "threads")
        above_zero(self, "copy_gb_per_s", "efficiency")
        rates = (
            "attention_tflops",
            "gather_gb_per_s",
            "row_update_gb_per_s",
            "layer_overhead_ms",
            "expert_overhead_ms",
        )
        at_least(self, 0, *rates)
        if not (self.matmul_tflops_fp32 or self.matmul_tflops_bf16):
            raise ConfigError(
                "matmul_tflops_fp32 and matmul_tflops_bf16 are empty; set the one that training computes in"
            )
        for name in ("matmul_tflops_fp32", "matmul_tflops_bf16", "elementwise_gb_per_s"):
            for size, rate in getattr(self, name).items():
                if not size.isdecimal() or rate <= 0:
                    raise ConfigError(f"{name} has {size}: {rate}; set a rate above 0 for a whole number")


@dataclass(kw_only=True, slots=True)
class CollectiveCeilings:
    """An entry of ``hardware.ceilings.collectives``: ``seconds = latency + bytes that a rank sends / bandwidth``."""

    operation: CollectiveName
    """Which collective."""
    ranks: int
    """Ranks that take part."""
    between_nodes: bool = False
    """Whether the slowest part of the way lies between nodes."""
    latency_us: float = 0.0
    """Microseconds of a small message."""
    gb_per_s: float = 1.0
    """GB/s that each rank sends, in an algorithm that sends as little as possible (:func:`megamem.observe.wire.sent_bytes`)."""

    def __post_init__(self) -> None:
        at_least(self, 2, "ranks")
        at_least(self, 0, "latency_us")
        above_zero(self, "gb_per_s")


@dataclass(kw_only=True, slots=True)
class CeilingsConfig:
    """``hardware.ceilings``: the most that was reached of everything a step consists of; `megamem profile --ceilings` measures."""

    source: str = ""
    """Where the numbers come from: `measured`, or `data sheet` for published peaks that nobody reaches."""
    date: str = ""
    """When they were measured."""
    efficiency: float = 1.0
    """Share of ``compute`` that training is taken to reach: 1 for measured rates, whose entries have their own, less for those of
    data sheets."""
    compute: list[RankCeilings] = field(default_factory=list)
    """Rates of a rank, for some numbers of ranks that work at once."""
    collectives: list[CollectiveCeilings] = field(default_factory=list)
    """Communication, for some operations and numbers of ranks; others are derived from the nearest."""
    disk_write_gb_per_s: float = 0.0
    """GB/s of a large file written and flushed, all ranks of a node together; 0: not known."""
    disk_read_gb_per_s: float = 0.0
    """GB/s of a large file read from the disk, not from the page cache; 0: not known."""
    process_mib: float = 0.0
    """Host memory of a rank that trains, before it holds anything of a model: interpreter, libraries, process groups."""
    kernels_mib: float = 0.0
    """What the compiled kernels of memories add to that."""
    fragmentation: float = 0.0
    """Share by which the allocator's reserve exceeds what a step has in small blocks (on a GPU in any) at the same time: measured
    on the reference model."""

    def __post_init__(self) -> None:
        at_least(self, 0, "disk_write_gb_per_s", "disk_read_gb_per_s", "process_mib", "kernels_mib", "fragmentation")
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"efficiency is {self.efficiency}; set a value above 0, up to 1")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """``hardware``: a node, for `megamem plan` and the peak that utilisation is told against."""

    device: str = "cpu"
    """What computes: ``cpu``, or the name of the GPU, such as ``NVIDIA H100 80GB HBM3``."""
    device_memory_gib: float = 0.0
    """Memory of one GPU that a process can get; 0 on a CPU, where everything is in host memory."""
    host_memory_gib: float = 0.0
    """Host memory of a node that its ranks can get together; 0: not known, so not checked."""
    disk_gib: float = 0.0
    """Local disk of a node that its ranks can get together; 0: not known, so not checked."""
    peak_tflops_bf16: float = 0.0
    """Dense bf16 TFLOP/s of one rank's device, from the data sheet: what model FLOP utilisation is a share of; 0: not known."""
    peak_tflops_fp32: float = 0.0
    """The same in fp32, or in TF32 where products of fp32 numbers are taken in it."""
    ceilings: CeilingsConfig = field(default_factory=CeilingsConfig)

    def __post_init__(self) -> None:
        at_least(self, 0, "device_memory_gib", "host_memory_gib", "disk_gib", "peak_tflops_bf16", "peak_tflops_fp32")
        if (self.device == "cpu") != (not self.device_memory_gib):
            raise ConfigError(
                f"device is {self.device} and device_memory_gib is {self.device_memory_gib}; set the memory of a GPU, and 0 "
                "for cpu"
            )

    @property
    def on_gpu(self) -> bool:
        """Whether ranks compute on GPUs."""
        return self.device != "cpu"

    def peak_tflops(self, precision: Literal["fp32", "bf16"]) -> float:
        """Peak of one rank's device in ``precision``; 0 where it is not known."""
        return self.peak_tflops_bf16 if precision == "bf16" else self.peak_tflops_fp32
