"""Heartbeats as the ranks write them (:mod:`megamem.observe.heartbeat`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ENDED = "ended"
"""Phase of the last record of a rank that came to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """One record of one rank; the fields are described where they are written."""

    beat: int
    rank: int
    host: str
    pid: int
    start_tick: int
    time: float
    step: int
    first_step: int
    phase: str
    sequence: int
    idle_seconds: float
    seconds: dict[str, float]

    @property
    def process(self) -> tuple[str, int, int]:
        """What names the process for ever."""
        return self.host, self.pid, self.start_tick

    @property
    def progress(self) -> tuple[int, int]:
        """What grows as long as the rank gets on."""
        return self.step, self.sequence

    @property
    def trained(self) -> bool:
        """Whether its process has done a step: what was spent in a phase is known once the step is over."""
        return "backward" in self.seconds


def parse_beat(text: str) -> Beat | None:
    """The record in ``text``; None where it was read while it was being written, or is no record."""
    try:
        record: dict[str, Any] = json.loads(text)
        if record["beat"] != record["end"]:
            return None
        return Beat(**{field.name: record[field.name] for field in fields(Beat)})
    except (ValueError, TypeError, KeyError):
        return None


def read_beats(live: Path) -> dict[int, Beat]:
    """By rank, the last record of every rank that wrote one into ``live``; those met half written are left out."""
    beats = {}
    for path in sorted(live.glob("rank-*.json")):
        try:
            beat = parse_beat(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if beat is not None:
            beats[beat.rank] = beat
    return beats
