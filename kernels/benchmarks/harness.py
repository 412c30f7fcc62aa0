"""Cases of a benchmark and how they are timed: contenders take turns, so a machine that drifts drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Options:
    """What every benchmark module gets."""

    rounds: int = 7
    """Counted rounds; one round before them warms up and is not counted."""
    quick: bool = False
    """Tiny sizes, which show that a benchmark runs and measure nothing."""
    seed: int = 0
    """Seed of ids and values."""


@dataclass(frozen=True)
class Contender:
    """One way to do the operation of a case."""

    name: str
    run: Callable[[], object]
    note: str = ""
    """What a reader must know, shown beside the name: a smaller input, a missing feature."""


@dataclass(frozen=True)
class Case:
    """An operation and those who do it; the first contender is ours."""

    name: str
    contenders: list[Contender]
    unit_bytes: int | None = None
    """Bytes that one run moves, for GB/s."""
    cpu_time: bool = False
    """Compare CPU seconds of the process, all threads together, instead of wall time."""
    bars: dict[str, float] = field(default_factory=dict)
    """By contender, the least ratio of its time to ours that megamem promises; below 1 where the peer is a physical limit."""

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"case `{self.name}`: contenders {names}, where each needs a name of its own")
        if unknown := set(self.bars) - set(names[1:]):
            raise ValueError(f"case `{self.name}`: bars for {sorted(unknown)}, none of its peers")


class NotInstalled(Exception):
    """Raised by a contender's first run where its library is missing; its row says so."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender in every counted round; none where it could not run, for the reason in ``missing``."""

    contender: Contender
    seconds: list[float]
    missing: str = ""

    @property
    def least(self) -> float:
        """Fastest round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Median round."""
        return statistics.median(self.seconds)


_PAUSE = 0.02
"""Seconds before each run: OpenMP's threads of the contender before spin for a while, on cores that the next one needs. A run that
does not count follows, since caches have gone cold meanwhile."""


def measure(case: Case, rounds: int) -> list[Timing]:
    """Time every contender of a case in ``rounds`` alternating rounds after one that is not counted.

    A contender whose first run raises NotInstalled or ImportError is left out and reported as missing.
    """
    clock = time.process_time if case.cpu_time else time.perf_counter
    timings = [_warm_up(contender) for contender in case.contenders]
    for _ in range(rounds):
        for timing in timings:
            if not timing.missing:
                time.sleep(_PAUSE)
                timing.contender.run()
                began = clock()
                timing.contender.run()
                timing.seconds.append(clock() - began)
    return timings


def _warm_up(contender: Contender) -> Timing:
    try:
        contender.run()
    except (NotInstalled, ImportError) as error:
        return Timing(contender, [], missing=str(error) or "not installed")
    return Timing(contender, [])
