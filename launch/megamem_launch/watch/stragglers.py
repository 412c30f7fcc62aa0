"""Which ranks and nodes compute longer than the others, from the seconds per phase in their heartbeats."""

from __future__ import annotations

from pathlib import Path
from statistics import median_low
from typing import Any

from megamem_launch.watch.beats import Beat, read_beats

BUSY = ("data", "plan", "forward", "backward", "dense_step", "row_update")
"""Phases in which a rank works on its own account; in the others it mostly waits for other ranks."""
SLOW = 1.2
"""A rank is slow when it is busy for so many times the median of its pipeline stage."""
STEPS = 20
"""Nobody is called slow before every rank has measured so many: a few steps are noise."""


def straggler_report(live: Path, stages: int = 1, world_size: int | None = None) -> dict[str, Any]:
    """Busy seconds per step of every rank and node whose heartbeats are in ``live``, and who is slow.

    Ranks are compared within their pipeline stage (``stages`` equal parts of the ranks, in order), since stages hold different
    layers; ``world_size``, the number of ranks, is taken from the heartbeats where it is left out. The lower median is the measure:
    of two ranks the faster one. Steps before and including the first that a heartbeat saw do not count, and nobody is called slow
    before :data:`STEPS` more. Times are the host's: on an asynchronous device they say who feeds it slowly, not whose is slow.

    Returns:
        ``steps`` (the fewest that any rank measured), ``ranks``: list of ``rank host stage steps busy_seconds ratio``, ``nodes``:
        by host the median ratio of its ranks, ``slow_ranks``, ``slow_nodes`` and ``text``, a sentence, empty where none is slow.
    """
    beats = read_beats(live)
    world = world_size or max(beats, default=0) + 1
    measured = [beat for beat in beats.values() if beat.step > beat.first_step > 0]
    busy = {beat.rank: _busy_seconds(beat) for beat in measured}
    stage_of = {rank: rank * stages // world for rank in busy}
    median = {
        stage: median_low(busy[rank] for rank in busy if stage_of[rank] == stage) for stage in set(stage_of.values())
    }
    ranks: list[dict[str, Any]] = [
        {
            "rank": beat.rank,
            "host": beat.host,
            "stage": stage_of[beat.rank],
            "steps": beat.step - beat.first_step,
            "busy_seconds": round(busy[beat.rank], 6),
            "ratio": round(busy[beat.rank] / (median[stage_of[beat.rank]] or 1.0), 3),
        }
        for beat in measured
    ]
    steps = min((rank["steps"] for rank in ranks), default=0)
    hosts = sorted({beat.host for beat in measured})
    nodes: dict[str, float] = {
        host: median_low(rank["ratio"] for rank in ranks if rank["host"] == host) for host in hosts
    }
    bound = SLOW if steps >= STEPS else float("inf")
    slow = sorted((rank for rank in ranks if rank["ratio"] > bound), key=lambda rank: -rank["ratio"])
    named = ", ".join(f"rank {rank['rank']} ({rank['host']}) {rank['ratio']:.2f}x" for rank in slow[:8])
    return {
        "steps": steps,
        "ranks": ranks,
        "nodes": nodes,
        "slow_ranks": [rank["rank"] for rank in slow],
        "slow_nodes": [host for host, ratio in nodes.items() if ratio > bound],
        "text": f"slower than the median of their stage: {named}" if named else "",
    }


def _busy_seconds(beat: Beat) -> float:
    return sum(beat.seconds.get(phase, 0.0) for phase in BUSY) / (beat.step - beat.first_step)
