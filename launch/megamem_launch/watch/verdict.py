"""Which rank is late, from what the ranks of a hang have in common and what one of them does otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megamem_launch.watch.beats import ENDED
from megamem_launch.watch.process import STATES
from megamem_launch.watch.watchdog import Hang

_STALE_SECONDS = 5.0
_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One rank of a run that hangs."""

    rank: int
    host: str
    pid: int
    step: int
    sequence: int
    phase: str
    idle_seconds: float
    """Since it last entered a phase, by its own account."""
    silent_seconds: float
    """Since the watchdog last heard of it."""
    answered: bool
    """Whether it gave its stacks when it was asked."""
    state: str | None
    """Letter of ``/proc/PID/stat``, ``gone``, or None where that cannot be told."""
    collective: str | None
    """What it waits for other ranks in."""
    caller: str | None
    """Innermost frame of megamem."""
    stack: tuple[str, ...]
    """Main thread, the innermost frame first."""


def judge(hang: Hang, reports: list[RankReport], stages: int = 1) -> tuple[list[int], str]:
    """The late ranks, none where all wait for each other, and one sentence that says why. Ranks enter the same phases as the
    others of their pipeline stage, of which there are ``stages`` in equal parts of the ranks."""
    if hang.kind == "start":
        return list(hang.missing), _not_started(hang)
    running = [report for report in reports if report.phase != ENDED]
    if not running:
        return [], f"all ranks came to their end {hang.seconds:.0f} s ago, but their processes are still there"
    late, why = _late(running, stages, hang.world_size)
    others = [report for report in running if report not in late]
    if not late:
        what = _what(running, f"all {len(running)} ranks")
        return [], f"no rank got on for {hang.seconds:.0f} s: {what}, so none can be told from the others"
    named = [f"{'it' if len(late) == 1 else _name(report)} {why(report)} {_when(report)}" for report in late[:_NAMED]]
    more = f"; and {len(late) - _NAMED} more" if len(late) > _NAMED else ""
    subject = f"{_name(late[0])} is" if len(late) == 1 else f"{len(late)} ranks are"
    rest = f", while {_what(others, f'all {len(others)} others')}" if others else ""
    return [report.rank for report in late], f"{subject} late: {'; '.join(named)}{more}{rest}"


def _late(running: list[RankReport], stages: int, world: int) -> tuple[list[RankReport], Callable[[RankReport], str]]:
    """The first kind of evidence, from the surest on, that tells some ranks from the others; with how to say it."""
    dead = [report for report in running if not report.answered and report.state in STATES]
    if dead:
        return dead, lambda report: STATES[report.state or ""] + (f" at {report.caller}" if report.caller else "")
    mute = [report for report in running if not report.answered]
    if len(mute) < len(running):
        if mute:
            return mute, lambda report: f"does not answer{_silence(report)}"
        elsewhere = [report for report in running if report.collective is None]
        if len(running) == 1 or 0 < len(elsewhere) < len(running):
            behind = _lowest(elsewhere or running, lambda report: report.step)
            return behind, lambda report: f"is {_waits(report)}{_silence(report)}"
    most: dict[int, int] = {}  # phases that the furthest rank of a stage entered
    for report in running:
        stage = report.rank * stages // world
        most[stage] = max(report.sequence, most.get(stage, 0))
    for key in (lambda report: report.step, lambda report: report.sequence - most[report.rank * stages // world]):
        behind = _lowest(running, key)
        if len(behind) < len(running):
            return behind, lambda report: f"is behind, {_waits(report)}{_silence(report)}"
    return [], _waits


def _lowest(reports: list[RankReport], key: Callable[[RankReport], int]) -> list[RankReport]:
    lowest = min(key(report) for report in reports)
    return [report for report in reports if key(report) == lowest]


def _name(report: RankReport) -> str:
    return f"rank {report.rank} ({report.host}, pid {report.pid})"


def _when(report: RankReport) -> str:
    return f"in phase {report.phase} of step {report.step}" if report.step else "before the first step"


def _silence(report: RankReport) -> str:
    return (
        f" and gave no sign of life for {report.silent_seconds:.0f} s" if report.silent_seconds > _STALE_SECONDS else ""
    )


def _waits(report: RankReport) -> str:
    if report.collective is not None:
        return f"in {report.collective} called from {report.caller}"
    return f"at {report.caller}" if report.caller else "at an unknown place"


def _what(reports: list[RankReport], all_of_them: str) -> str:
    """What most of ``reports`` do, in a clause; ``all_of_them`` is what they are called together."""
    waiting = [report for report in reports if report.collective is not None]
    places = Counter(
        _waits(report) if waiting else f"{_waits(report)} {_when(report)}" for report in waiting or reports
    )
    place, count = places.most_common(1)[0]
    if count == 1:
        return f"1 rank {'waits' if waiting else 'is'} {place}"
    return f"{all_of_them if count == len(reports) else f'{count} ranks'} {'wait' if waiting else 'are'} {place}"


def _not_started(hang: Hang) -> str:
    ranks = ", ".join(str(rank) for rank in hang.missing[:16]) + (", ..." if len(hang.missing) > 16 else "")
    others = f"{len(hang.beats)} others did" if hang.beats else "nor did any other"
    return (
        f"rank{'s' if len(hang.missing) > 1 else ''} {ranks} gave no sign of life within {hang.seconds:.0f} s, {others}; the logs "
        "of the ranks say how far they came"
    )
