"""Nodes that a run avoids, remembered across its jobs."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path

from megamem_launch import rundir


def excluded(run_dir: Path) -> dict[str, str]:
    """The nodes that the run avoids and why, the longest avoided first."""
    entries = rundir.read_json(rundir.excluded_file(run_dir)) or {}
    return {node: entries[node]["reason"] for node in sorted(entries, key=lambda node: entries[node]["time"])}


def exclude(run_dir: Path, nodes: Mapping[str, str], incarnation: str) -> None:
    """Avoid ``nodes`` (name to reason) from now on."""
    path = rundir.excluded_file(run_dir)
    new = {
        node: {"reason": why, "time": round(time.time(), 3), "incarnation": incarnation} for node, why in nodes.items()
    }
    rundir.write_json(path, {**(rundir.read_json(path) or {}), **new})


def fit(run_dir: Path, usable: Collection[str], needed: int) -> list[str]:
    """Forget the longest avoided nodes until ``needed`` of the ``usable`` ones are left, or none is avoided any more.

    Returns the forgotten ones. Without this a job that avoids too many nodes would wait for ever.
    """
    path = rundir.excluded_file(run_dir)
    entries = rundir.read_json(path) or {}
    forgotten = []
    for node in excluded(run_dir):
        if len(set(usable) - set(entries)) >= needed:
            break
        del entries[node]
        forgotten.append(node)
    if forgotten:
        rundir.write_json(path, entries)
    return forgotten
