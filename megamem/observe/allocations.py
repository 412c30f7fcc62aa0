"""Peak memory by kind, from the allocator's own records: the allocations and frees that torch.profiler notes for the CPU and the
CUDA allocator alike, and the phase in which each was made.
"""

from __future__ import annotations

import bisect
import ctypes
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megamem.observe.phases import NAMES

KINDS = ("parameters", "gradients", "optimizer", "tables", "activations", "buffers", "fragmentation", "process")
"""``activations``: what forward allocates and backward needs or makes for the moment. ``gradients``: what backward leaves.
``buffers``: working sets of rows, messages, reductions. ``fragmentation``: what the allocator holds and nobody uses.
``process``: on the CPU, the rest of the resident set: interpreter, libraries, threads, buffers that other threads allocate."""

_OF_PHASE = {
    "forward": "activations",
    "backward": "activations",
    "pipeline_wait": "activations",
    "evaluate": "activations",
}
_AFTER_BACKWARD = ("exchange", "dense_reduce")


@dataclass(frozen=True, slots=True)
class Range:
    """A phase that was entered and left, in nanoseconds."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """A block that the allocator handed out (``nbytes`` above zero) or took back (below)."""

    time: int
    """Nanoseconds, by the clock of the ranges."""
    address: int
    nbytes: int


@dataclass(slots=True)
class Peak:
    """Bytes of the blocks that were allocated in a window, at the moment when they were most."""

    total: int = 0
    phase: str = ""
    """In which it was reached."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Bytes at that moment."""
    largest: dict[str, int] = field(default_factory=dict)
    """The most of every kind, each at its own moment."""


def read_profile(profile: Any, device_type: str) -> tuple[list[Allocation], list[Range]]:
    """The allocations on devices of this type, and the phases, of a ``torch.profiler.profile`` with ``profile_memory`` that
    has ended; both in the order of time."""
    allocations: list[Allocation] = []
    ranges: list[Range] = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        fields = event.extra_fields
        if type(fields).__name__ == "_ExtraFields_Allocation":
            if fields.device.type == device_type:
                allocations.append(Allocation(event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name in NAMES:
            ranges.append(Range(event.name, event.start_time_ns, event.end_time_ns))
    return sorted(allocations, key=lambda a: a.time), sorted(ranges, key=lambda r: r.start)


def peak_of(allocations: Sequence[Allocation], ranges: Sequence[Range]) -> Peak:
    """Replay ``allocations`` and find their peak. Frees of blocks that are older than the window change nothing.

    A block that backward allocates is a gradient if it is still there when the exchange or the reduction after it begins.
    """
    phase_at = _timeline(ranges)
    ends = sorted(r.start for r in ranges if r.name in _AFTER_BACKWARD)
    freed: dict[int, int] = {}  # by position of the allocation: when its block came back
    open_: dict[int, int] = {}
    for position, event in enumerate(allocations):
        if event.nbytes > 0:
            open_[event.address] = position
        elif event.address in open_:
            freed[open_.pop(event.address)] = event.time

    live: dict[int, tuple[str, int]] = {}
    held: Counter[str] = Counter()
    peak, total = Peak(), 0
    for position, event in enumerate(allocations):
        # An address that is handed out again was taken back by a thread that is not recorded.
        if (block := live.pop(event.address, None)) is not None:
            held[block[0]] -= block[1]
            total -= block[1]
        if event.nbytes <= 0:
            continue
        phase = phase_at(event.time)
        kind = _OF_PHASE.get(phase, "buffers")
        if phase == "backward" and (after := bisect.bisect_right(ends, event.time)) < len(ends):
            kind = "gradients" if freed.get(position, ends[after]) >= ends[after] else kind
        live[event.address] = kind, event.nbytes
        held[kind] += event.nbytes
        total += event.nbytes
        peak.largest[kind] = max(peak.largest.get(kind, 0), held[kind])
        if total > peak.total:
            peak.total, peak.phase, peak.kinds = total, phase, dict(held)
    return peak


def _timeline(ranges: Sequence[Range]) -> Any:
    """The innermost phase at a time; ``other`` outside all."""
    boundaries: list[tuple[int, str]] = []
    stack: list[Range] = []
    for each in (*ranges, None):
        while stack and (each is None or stack[-1].stop <= each.start):
            ended = stack.pop()
            boundaries.append((ended.stop, stack[-1].name if stack else "other"))
        if each is not None:
            stack.append(each)
            boundaries.append((each.start, each.name))
    times = [time for time, _ in boundaries]

    def phase_at(time: int) -> str:
        index = bisect.bisect_right(times, time) - 1
        return boundaries[index][1] if index >= 0 else "other"

    return phase_at


def add_up(static: Mapping[str, int], peak: Peak, *, gradients: int, held: int, free: int) -> dict[str, int]:
    """All kinds at the peak: what is there all the time, what the window allocated, and what that leaves of ``held``, the most
    that the device or process held, of which ``free`` bytes are the allocator's and in no block.

    ``gradients``: bytes of the gradients of all parameters. What backward leaves beyond them are buckets of the reduction.
    """
    kinds = Counter(static) + Counter(peak.kinds)
    if (buckets := kinds["gradients"] - gradients) > 0:
        kinds["gradients"] -= buckets
        kinds["buffers"] += buckets
    kinds["fragmentation"] = free
    kinds["process"] = held - sum(kinds.values())
    return {kind: int(kinds[kind]) for kind in KINDS if kinds[kind]}


_MALLINFO2 = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO2)


def heap_free_bytes() -> int:
    """Bytes that the C library's heap holds in no block (``mallinfo2``, glibc 2.33 and later); 0 where it does not tell."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().fordblks)


def kinds_of(held: Mapping[str, int], places: Iterable[str]) -> dict[str, int]:
    """Bytes by kind of what :mod:`megamem.observe.accounting` reports, in some of its places."""
    sums: Counter[str] = Counter()
    for place in places:
        for key, size in held.items():
            if key.endswith(f"_{place}"):
                sums[key.removesuffix(f"_{place}")] += size
    return dict(sums)
