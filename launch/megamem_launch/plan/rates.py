"""Rates of one rank, from measured or published ceilings: how long each kind of work and each collective takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from megamem.errors import ConfigError
from megamem_launch.plan.hardware import CollectiveCeilings, HardwareConfig

_GIGA, _TERA, _MIB = 1e9, 1e12, 2**20


class Machine:
    """Rates of one rank of a node.

    Args:
        hardware: Must have ``ceilings.compute``.
        ranks: Of a node.
        cores: Of a node, which its ranks share where they compute on CPUs.
        precision: Of products.
        nodes: Of the cluster.
    """

    def __init__(self, hardware: HardwareConfig, *, ranks: int, cores: int, precision: str, nodes: int = 1) -> None:
        if not hardware.ceilings.compute:
            raise ConfigError(
                "the hardware has no ceilings, from which time is estimated; run `megamem profile --ceilings --out FILE` there "
                "and paste its hardware section into the cluster file"
            )
        self.hardware, self.ranks, self.nodes = hardware, ranks, nodes
        entries = sorted(hardware.ceilings.compute, key=lambda entry: entry.ranks)
        entry = next((entry for entry in entries if entry.ranks >= ranks), entries[-1])
        threads = 1 if hardware.on_gpu else max(1, cores // ranks)
        self.crowding = 1.0 if hardware.on_gpu else max(1.0, ranks * threads / cores)
        """Ranks that share one core."""
        self._entry = entry
        self._share = entry.efficiency * hardware.ceilings.efficiency
        """Of the entry's rates, what a step reaches."""
        self._matmul = _points(entry.matmul_tflops_bf16 if precision == "bf16" else entry.matmul_tflops_fp32)
        if not self._matmul:
            raise ConfigError(f"hardware.ceilings.compute has no matmul_tflops_{precision}; measure or set it")
        self._elementwise = _points(entry.elementwise_gb_per_s)

    def matmul(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of ``[rows, inner] x [inner, columns]``."""
        rate = _between(self._matmul, max(1.0, rows)) * _TERA * self._share
        return 2 * rows * inner * columns / rate

    def attention(self, flops: float) -> float:
        """Seconds of core attention."""
        rate = self._entry.attention_tflops or self._matmul[-1][1]
        return flops / (rate * _TERA * self._share)

    def elementwise(self, elements: float, nbytes: float, times: float) -> float:
        """Seconds of ``times`` reads or writes of ``elements`` numbers, which come in tensors of as many."""
        if not elements:
            return 0.0
        rate = _between(self._elementwise, elements * nbytes / _MIB) if self._elementwise else self._entry.copy_gb_per_s
        return elements * nbytes * times / (rate * _GIGA * self._share)

    def copy(self, nbytes: float) -> float:
        """Seconds to read and write ``nbytes`` in all, of large arrays."""
        return nbytes / (self._entry.copy_gb_per_s * _GIGA * self._share)

    def touch(self, nbytes: float) -> float:
        """Seconds to get ``nbytes`` anew of the system, in blocks that it had back: what an operation that allocates a large result
        takes longer than a copy of as many bytes."""
        if not self._elementwise or self.hardware.on_gpu:
            return 0.0
        slower = 3 / self._elementwise[-1][1] - 3 / self._entry.copy_gb_per_s
        return max(0.0, slower) * nbytes / (_GIGA * self._share)

    def gather(self, nbytes: float) -> float:
        """Seconds to read and write ``nbytes`` of rows."""
        return nbytes / ((self._entry.gather_gb_per_s or self._entry.copy_gb_per_s) * _GIGA * self._share)

    def row_update(self, nbytes: float) -> float:
        """Seconds to read and write ``nbytes`` of rows and their state."""
        return nbytes / ((self._entry.row_update_gb_per_s or self._entry.copy_gb_per_s) * _GIGA * self._share)

    def layer_overhead(self) -> float:
        """Seconds of a layer that computes next to nothing, forward and backward."""
        return self._entry.layer_overhead_ms / 1e3 / (1.0 if self.hardware.on_gpu else self._share)

    def expert_overhead(self) -> float:
        """The same of an expert."""
        return self._entry.expert_overhead_ms / 1e3 / (1.0 if self.hardware.on_gpu else self._share)

    def collective(
        self, operation: str, nbytes: float, size: int, *, calls: float = 1, span: int | None = None
    ) -> float:
        """Seconds of ``calls`` collectives in which each of ``size`` ranks sends ``nbytes`` altogether.

        ``span``: ranks from the group's first to its last, which tells whether it leaves the node; None for ``size``.
        """
        if size <= 1 or not nbytes:
            return 0.0
        between = self.nodes > 1 and (span or size) > self.ranks
        link = self._link(operation, size, between)
        if link is None:
            return nbytes / (self._entry.copy_gb_per_s * _GIGA)
        return calls * link.latency_us / 1e6 + nbytes / (link.gb_per_s * _GIGA)

    def _link(self, operation: str, size: int, between: bool) -> CollectiveCeilings | None:
        links = self.hardware.ceilings.collectives
        fitting = [link for link in links if link.between_nodes == between] or links
        fitting = [link for link in fitting if link.operation == operation] or fitting
        busy = max(size, self.ranks) if not self.hardware.on_gpu else size  # every group of the node sends at once
        return min(fitting, key=lambda link: abs(math.log(link.ranks / busy)), default=None)


def _points(rates: Mapping[str, float]) -> list[tuple[float, float]]:
    return sorted((float(size), rate) for size, rate in rates.items())


def _between(points: Sequence[tuple[float, float]], size: float) -> float:
    """The rate at ``size``, interpolated in the logarithms of both; below the first point rates fall in proportion."""
    (first, rate), (last, top) = points[0], points[-1]
    if size <= first:
        return rate if len(points) == 1 else rate * max(size / first, 1 / 64)
    if size >= last:
        return top
    (low, a), (high, b) = next(pair for pair in itertools.pairwise(points) if size <= pair[1][0])
    share = math.log(size / low) / math.log(high / low)
    return float(a ** (1 - share) * b**share)
