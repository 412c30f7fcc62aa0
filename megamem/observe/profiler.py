"""Windows of a profiled run: warm-up, measured, traced. One object on every rank; the training loop calls it after each step.

The measured window has marks of phases and counts of bytes, as every run could, and nothing else. On a CUDA device its phases say
where the host was; a window of their own, of as many steps, waits for the device at every boundary and tells where the time
went. The traced window is slow and tells what happened: a trace with the phases as named ranges, and all allocations.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megamem.observe.allocations import Peak, heap_free_bytes, peak_of, read_profile
from megamem.observe.memory import peak_rss, reset_peak_rss
from megamem.observe.phases import NAMES, Phases
from megamem.observe.wire import Traffic, WireCounter

_SECONDS = "seconds/"


@dataclass(frozen=True, slots=True)
class Windows:
    """Optimizer steps of every window."""

    warmup: int
    steps: int
    traced: int

    def plan(self, device: torch.device) -> list[tuple[str, int]]:
        """Names and lengths, in order; those without a step are left out."""
        phases = self.steps if device.type == "cuda" else 0
        plan = [("warmup", self.warmup), ("measured", self.steps), ("phases", phases), ("traced", self.traced)]
        return [(name, steps) for name, steps in plan if steps]

    def total(self, device: torch.device) -> int:
        """Steps of all windows."""
        return sum(steps for _, steps in self.plan(device))


@dataclass(slots=True)
class Measured:
    """What one rank measured."""

    step_seconds: list[float] = field(default_factory=list)
    """Wall time from the end of one step to the end of the next, of the measured window."""
    breakdown: dict[str, float] = field(default_factory=dict)
    """Seconds per step by phase."""
    breakdown_wall: float = 0.0
    """Wall seconds per step of the window that :attr:`breakdown` is of, by the same clock but not from the same marks."""
    wires: dict[str, dict[str, Traffic]] = field(default_factory=dict)
    """Sent per step, by wire and operation, see :mod:`megamem.observe.wire`; of the measured window."""
    peak: Peak = field(default_factory=Peak)
    """Of what the traced window allocated; zero without one."""
    held_bytes: int = 0
    """The most that the measured window held: reserved by the CUDA allocator, or resident."""
    allocated_bytes: int = 0
    """The most that was in use of it; 0 on the CPU, which does not tell."""
    free_bytes: int = 0
    """Of what was held, the allocator's own: reserved or in the heap, and in no block."""
    trace: str = ""
    """File name of the trace."""
    snapshot: str = ""
    """File name of the CUDA allocator's history, for https://pytorch.org/memory_viz."""


class StepProfiler:
    """Opens and closes the windows.

    Args:
        windows: Lengths of the windows.
        marks: The phases that the training loop marks.
        counter: Counts bytes.
        device: Of this rank.
        out: Directory for traces.
        rank: Of this process; in file names.
        nsys: Leave the traced window to an NVIDIA Nsight Systems that runs this process and waits for ``cudaProfilerStart``.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        marks: Phases,
        counter: WireCounter,
        device: torch.device,
        out: Path,
        rank: int,
        nsys: bool = False,
    ) -> None:
        self.measured = Measured()
        self._plan = windows.plan(device)
        self._marks, self._counter, self._device = marks, counter, device
        self._out, self._rank, self._nsys = out, rank, nsys
        self._open = contextlib.ExitStack()
        self._window, self._left = "", 0
        self._window_began = self._step_began = 0.0
        self._phases: dict[str, float] = {}

    def begin(self) -> None:
        """Before the first step."""
        self._next()

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """The trainer's report of a step, which has ``seconds/<phase>``."""
        for name in NAMES:
            self._phases[name] = self._phases.get(name, 0.0) + metrics.get(_SECONDS + name, 0.0)

    def after_step(self) -> None:
        """A step ended."""
        if self._window == "measured":
            now = time.perf_counter()
            self.measured.step_seconds.append(now - self._step_began)
            self._step_began = now
        self._left -= 1
        if self._left == 0:
            self._end()
            self._next()

    def close(self) -> None:
        """Leave whatever is open. Idempotent."""
        self._open.close()
        self._marks.trace, self._marks.synchronize = False, None

    def _next(self) -> None:
        self._window, self._left = self._plan.pop(0) if self._plan else ("", math.inf)  # type: ignore[assignment]
        cuda = self._device.type == "cuda"
        if self._window == "measured":
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                reset_peak_rss()
            self._counter.take()
            self._open.enter_context(self._counter.counting())
        elif self._window == "phases":
            self._marks.synchronize = torch.cuda.synchronize
        elif self._window == "traced":
            self._marks.trace = True
            self._open.enter_context(self._tracing())
        self._synchronize()
        self._phases.clear()
        self._marks.take()  # what came before
        self._window_began = self._step_began = time.perf_counter()

    def _end(self) -> None:
        self._synchronize()
        elapsed = time.perf_counter() - self._window_began
        self.observe(
            {_SECONDS + name: seconds for name, seconds in self._marks.take().items()}
        )  # since the last report
        measured, steps = self.measured, len(self.measured.step_seconds)
        if self._window == "measured":
            measured.wires = _per_step(self._counter.take(), steps)
            self._read_memory()
        # The window of phases comes after the measured one and overrides it.
        if self._window in ("measured", "phases"):
            measured.breakdown = {name: seconds / steps for name, seconds in self._phases.items() if seconds}
            measured.breakdown_wall = elapsed / steps
        self.close()

    def _read_memory(self) -> None:
        measured = self.measured
        if self._device.type == "cuda":
            measured.held_bytes = torch.cuda.max_memory_reserved()
            measured.allocated_bytes = torch.cuda.max_memory_allocated()
            measured.free_bytes = measured.held_bytes - measured.allocated_bytes
        else:
            measured.held_bytes, measured.free_bytes = peak_rss(), heap_free_bytes()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _tracing(self) -> Any:
        if self._nsys:
            torch.cuda.profiler.start()
            with torch.autograd.profiler.emit_nvtx():
                yield
            torch.cuda.profiler.stop()
            return
        cuda = self._device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        with torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True) as profile:
            yield
        self.measured.peak = peak_of(*read_profile(profile, self._device.type))
        self.measured.trace = f"trace-rank{self._rank}.json.gz"
        profile.export_chrome_trace(str(self._out / self.measured.trace))
        if cuda:
            self.measured.snapshot = f"memory-rank{self._rank}.pickle"  # the form that the viewer takes; not read here
            torch.cuda.memory._dump_snapshot(str(self._out / self.measured.snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)


def bubble(breakdown: Mapping[str, float], *, pp: int, vpp: int, micro_batches: int) -> dict[str, float]:
    """How much of a step a rank waits for other stages, and how much the schedule makes unavoidable.

    ``share_of_step`` is measured; ``over_compute``, the wait as a multiple of forward and backward, compares with ``formula``,
    ``(pp - 1) / (vpp m)`` of a schedule whose stages take equally long and whose messages take no time (Narayanan et al. 2021,
    arXiv 2104.04473, section 2.2).
    """
    compute = breakdown.get("forward", 0.0) + breakdown.get("backward", 0.0)
    wait = breakdown.get("pipeline_wait", 0.0)
    return {
        "share_of_step": wait / max(sum(breakdown.values()), 1e-12),
        "over_compute": wait / max(compute, 1e-12),
        "formula": (pp - 1) / (vpp * micro_batches),
    }


def step_times(seconds: list[float]) -> dict[str, float]:
    """Mean, median, least and most of the seconds of steps."""
    return {
        "mean": statistics.fmean(seconds),
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
    }


def _per_step(wires: Mapping[str, Mapping[str, Traffic]], steps: int) -> dict[str, dict[str, Traffic]]:
    return {
        wire: {name: Traffic(traffic.calls / steps, traffic.sent / steps) for name, traffic in operations.items()}
        for wire, operations in wires.items()
    }
