"""Asks the ranks of a run that hangs for their stacks, and writes down which one is late and what the others wait in."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megamem.files import write_text
from megamem.observe.heartbeat import node_name
from megamem_launch.watch.beats import Beat
from megamem_launch.watch.process import STATES, py_spy, state_here
from megamem_launch.watch.stacks import Thread, parse_faulthandler, parse_py_spy, place
from megamem_launch.watch.verdict import RankReport, judge
from megamem_launch.watch.watchdog import Hang

HANG_FILE = "hang.json"
"""The verdict, in the directory of the dumps."""
_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 1.5  # a rank flushes its stacks with its next heartbeat


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which ranks are late, and why it is thought so."""

    sentence: str
    late: tuple[int, ...]
    """Ranks; empty where all of them wait for each other."""
    nodes: tuple[str, ...]
    """Hosts of the late ranks, as far as they are known."""
    ranks: tuple[RankReport, ...]


def collect(
    hang: Hang,
    signal_all: Callable[[], None],
    timeout: float = 15.0,
    state: Callable[[Beat], str | None] = state_here,
    elsewhere: Callable[[Sequence[Beat]], dict[int, str]] = lambda beats: {},
    stages: int = 1,
) -> Verdict:
    """Have SIGUSR2 sent to every rank by ``signal_all``, wait at most ``timeout`` s until their stacks have come, judge, and
    write everything to :data:`HANG_FILE`.

    ``state`` tells how a rank's process is: a letter of ``/proc/PID/stat``, ``gone``, or None where it cannot be told here;
    ``elsewhere`` tells the same of ranks on other machines, and is asked once, of those that gave no stacks. ``stages`` are
    those of the pipeline. Whatever fails on the way, the verdict is made of what is there: it must not keep anybody
    from starting the run again.
    """
    before = {rank: len(_dump(hang, rank)) for rank in hang.beats}
    problem = ""
    try:
        signal_all()
    except Exception as error:  # of a scheduler that does not answer, or a process that ended meanwhile
        problem = f"{type(error).__name__}: {error}"
    states = _wait(hang, before, time.monotonic() + timeout, state)
    mute = [
        beat for rank, beat in hang.beats.items() if states[rank] is None and len(_dump(hang, rank)) == before[rank]
    ]
    try:
        states |= elsewhere(mute) if mute else {}
    except Exception as error:
        problem = problem or f"{type(error).__name__}: {error}"
    reports = [
        _report(hang, beat, _dump(hang, rank)[before[rank] :], states[rank]) for rank, beat in hang.beats.items()
    ]
    late, sentence = judge(hang, sorted(reports, key=lambda report: report.rank), stages)
    nodes = sorted({hang.beats[rank].host for rank in late if rank in hang.beats})
    verdict = Verdict(sentence, tuple(late), tuple(nodes), tuple(reports))
    record: dict[str, Any] = {"time": time.time(), "kind": hang.kind, "seconds": hang.seconds, **asdict(verdict)}
    with contextlib.suppress(OSError):
        hang.dumps.mkdir(parents=True, exist_ok=True)
        write_text(hang.dumps / HANG_FILE, json.dumps({**record, "signal_problem": problem}, indent=1) + "\n")
    return verdict


def _wait(
    hang: Hang, before: dict[int, int], deadline: float, state: Callable[[Beat], str | None]
) -> dict[int, str | None]:
    """Until every rank that can answer has and no dump grows any more; the states of the processes."""
    sizes, changed = before, time.monotonic()
    while True:
        time.sleep(_POLL_SECONDS)
        states = {rank: state(beat) for rank, beat in hang.beats.items()}
        now = time.monotonic()
        last, sizes = sizes, {rank: len(_dump(hang, rank)) for rank in hang.beats}
        if last != sizes:
            changed = now
        able = [rank for rank in hang.beats if states[rank] not in STATES]
        settled = now - changed > _SETTLE_SECONDS and all(sizes[rank] > before[rank] for rank in able)
        if settled or now > deadline:
            return states


def _report(hang: Hang, beat: Beat, dump: bytes, state: str | None) -> RankReport:
    threads: list[Thread] = parse_faulthandler(dump.decode(errors="replace"))
    if not dump and state in ("T", "D"):
        threads = _from_outside(hang, beat)
    found = place(threads)
    main = next((thread.frames for thread in threads if thread.main), ())
    return RankReport(
        rank=beat.rank,
        host=beat.host,
        pid=beat.pid,
        step=beat.step,
        sequence=beat.sequence,
        phase=beat.phase,
        idle_seconds=beat.idle_seconds,
        silent_seconds=round(hang.silent[beat.rank], 1),
        answered=bool(dump),
        state=state,
        collective=found.collective if found else None,
        caller=found.caller if found else None,
        stack=tuple(frame.where for frame in main),
    )


def _from_outside(hang: Hang, beat: Beat) -> list[Thread]:
    text = py_spy(beat.pid) if beat.host == node_name() else None
    if text is None:
        return []
    with contextlib.suppress(OSError):
        write_text(hang.dumps / f"rank-{beat.rank:05d}.py-spy.json", text)
    return parse_py_spy(text)


def _dump(hang: Hang, rank: int) -> bytes:
    """The file is opened anew each time: only then does a network file system ask its server."""
    try:
        descriptor = os.open(hang.dumps / f"rank-{rank:05d}.txt", os.O_RDONLY)
    except OSError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
