"""Decides that a run hangs, from the heartbeats of its ranks alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamem_launch.watch.beats import ENDED, Beat, read_beats

SLOW_PHASES = {"checkpoint": 4.0, "evaluate": 4.0}
"""Phases within which a rank may be without a mark for so many times ``hang_seconds``."""


@dataclass(frozen=True, slots=True)
class Hang:
    """No rank gets on, or some never began."""

    kind: Literal["stall", "start"]
    seconds: float
    """Since any rank last got on; for ``start``, since the watchdog began."""
    beats: dict[int, Beat]
    """The last record of every rank that wrote one."""
    silent: dict[int, float]
    """Seconds since each of them last wrote: about the interval of heartbeats, unless it is stopped or cut off."""
    missing: tuple[int, ...]
    """Ranks that never wrote a record."""
    dumps: Path
    """Where the ranks put their stacks when they are asked."""
    world_size: int
    """Ranks of the run, those without a record among them."""


class Watchdog:
    """Watches the records of ``world_size`` ranks in ``live``, whose stacks will be in ``dumps``.

    A run hangs when *no* rank changes step or phase for ``hang_seconds``: ranks go in step, so one that is late soon stops all
    the others, and as long as any gets on nothing is wrong. Before its first step is done (loading a checkpoint, compiling) it has
    ``start_seconds``, and a checkpoint or evaluation may take :data:`SLOW_PHASES` times as long. A rank without any record
    ``start_seconds`` after the first check did not start. Keep ``hang_seconds`` below the timeout of collectives, after which ranks
    end by themselves and leave nothing to look at.

    Clocks are compared with nobody's: what counts is when this process first saw a change.
    """

    def __init__(
        self, live: Path, dumps: Path, world_size: int, hang_seconds: float, start_seconds: float = 900.0
    ) -> None:
        self._live, self._dumps, self._world_size = live, dumps, world_size
        self._hang_seconds, self._start_seconds = hang_seconds, max(start_seconds, hang_seconds)
        self._began: float | None = None
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._moved = 0.0

    @property
    def beats(self) -> dict[int, Beat]:
        """The last records, as of the last check."""
        return dict(self._beats)

    def check(self, now: float | None = None) -> Hang | None:
        """Read the records once; ``now`` [s] is a clock that never goes back, the monotonic one where it is left out."""
        now = time.monotonic() if now is None else now
        if self._began is None:
            self._began = self._moved = now
        for rank, beat in read_beats(self._live).items():
            last = self._beats.get(rank)
            if last is None or (last.process, last.progress, last.phase) != (beat.process, beat.progress, beat.phase):
                self._moved = now
            if last is None or (last.process, last.beat) != (beat.process, beat.beat):
                self._heard[rank] = now
            self._beats[rank] = beat
        missing = tuple(rank for rank in range(self._world_size) if rank not in self._beats)
        if missing and now - self._began > self._start_seconds:
            return self._hang("start", now - self._began, now, missing)
        if now - self._moved > self._bound():
            return self._hang("stall", now - self._moved, now, missing)
        return None

    def _bound(self) -> float:
        running = [beat for beat in self._beats.values() if beat.phase != ENDED]
        if not any(beat.trained for beat in running):
            return self._start_seconds
        return self._hang_seconds * max(SLOW_PHASES.get(beat.phase, 1.0) for beat in running)

    def _hang(self, kind: Literal["stall", "start"], seconds: float, now: float, missing: tuple[int, ...]) -> Hang:
        silent = {rank: now - heard for rank, heard in self._heard.items()}
        return Hang(kind, seconds, self.beats, silent, missing, self._dumps, self._world_size)
