"""What happened to a run, from its journal and from what the launcher's supervisor wrote beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megamem.observe.charts import Mark
from megamem.observe.journal import Entry

_INCARNATIONS = Path("launch") / "incarnations.jsonl"
_FAILURES = ("node_failure", "hang", "crash", "preflight", "superseded", "fatal")
TROUBLE = ("killed", "fail", "checkpoint_failed", *_FAILURES)
"""Names of events that a person should look at."""
_ENDS = ("stop", "fail", "killed", "time_limit", "preempted", "cancelled", *_FAILURES)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a run's history."""

    time: float
    """Seconds since the epoch."""
    step: int
    name: str
    """Of the journal's events, ``resume``, ``killed``, or how the supervisor says that an incarnation ended."""
    details: str

    @property
    def utc(self) -> str:
        """Time as text."""
        return utc(self.time)

    @property
    def kind(self) -> str:
        """``trouble`` for what a person should look at, ``skip``, or empty."""
        return "trouble" if self.name in TROUBLE else "skip" if self.name == "skip" else ""


def events_of(run_dir: Path, entries: list[Entry]) -> list[Event]:
    """What happened, in order of time. ``entries``: the journal with those that a resume overtook.

    Where the journal breaks off and the supervisor says why, that is one event: the supervisor's. The ranks of a cancelled run
    may outlive their supervisor; how they end is no event either.
    """
    told, explained = _from_journal(entries), _from_supervisor(run_dir / _INCARNATIONS)
    starts = [event.time for event in told if event.name in ("start", "resume")]

    def is_explained(event: Event) -> bool:
        since = max((time for time in starts if time <= event.time), default=-math.inf)
        until = min((time for time in starts if time > event.time), default=math.inf)
        return any((since if end.name == "cancelled" else event.time) <= end.time <= until for end in explained)

    own = [event for event in told if event.name not in ("killed", "fail") or not is_explained(event)]
    return sorted([*own, *explained], key=lambda event: event.time)


def marks_of(events: list[Event]) -> list[Mark]:
    """The events that charts over the steps show."""
    marks = []
    for event in events:
        text = f"{event.name.replace('_', ' ')} at step {event.step}"
        if event.name == "resume":
            marks.append(Mark(event.step, "resume", f"resumed at step {event.step}"))
        elif event.kind == "skip":
            marks.append(Mark(event.step, "skip", text))
        elif event.kind == "trouble" and event.name != "killed":  # a resume stands where the killed run went on
            marks.append(Mark(event.step, "trouble", f"{text}: {event.details}" if event.details else text))
    return marks


def spans(events: list[Event], last: float) -> list[tuple[float, float, Event]]:
    """Start and end of each incarnation, with the event that ended it (its start, for one that runs still)."""
    found: list[tuple[float, float, Event]] = []
    begun: Event | None = None
    for event in events:
        if event.name in ("start", "resume"):
            begun = event
        elif event.name in _ENDS and begun is not None:
            found.append((begun.time, event.time, event))
            begun = None
    if begun is not None:
        found.append((begun.time, max(last, begun.time), begun))
    return found


def utc(seconds: float) -> str:
    """A time since the epoch as text."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _from_journal(entries: list[Entry]) -> list[Event]:
    """Events, skipped steps, and kills: a start whose predecessor had neither stopped nor failed tells of one."""
    found: list[Event] = []
    told = {e["step"] for e in entries if e.get("event") == "skip"}
    running = False
    for previous, entry in zip([None, *entries], entries, strict=False):
        name = entry.get("event")
        if name == "start":
            if running and previous:
                found.append(_event(previous, "killed", {}))
            running = True
            found.append(_event(entry, "resume" if entry["step"] else "start", _details(entry)))
        elif name:
            running = running and name not in ("stop", "fail")
            found.append(_event(entry, name, _details(entry)))
        elif entry.get("skipped") and entry["step"] not in told:
            found.append(_event(entry, "skip", {key: entry.get(key) for key in ("loss", "grad_norm")}))
    return found


def _from_supervisor(path: Path) -> list[Event]:
    """Ends of incarnations that the supervisor gave a reason for, and the nodes that it left out since."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # a run without a supervisor
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
            if record["event"] == "end" and record["outcome"] not in ("finished", "stopped"):
                bad = ", ".join(record.get("bad_nodes") or [])
                details = [record.get("reason") or "", f"without {bad} from here on" if bad else ""]
                text = "; ".join(part for part in details if part)
                found.append(Event(float(record["time"]), int(record.get("step") or 0), record["outcome"], text))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _details(event: Entry) -> dict[str, Any]:
    return {k: v for k, v in event.items() if k not in ("time", "kind", "step", "event")}


def _event(entry: Entry, name: str, details: Mapping[str, Any]) -> Event:
    shown = []
    for key, value in details.items():
        if isinstance(value, Mapping):
            value = " ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items())
        told = "not finite" if value is None else value
        shown.append(str(told) if key == "text" else f"{key.replace('_', ' ')} {told}")
    return Event(entry["time"], entry["step"], name, ", ".join(shown))
