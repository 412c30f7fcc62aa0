"""What the checks before a start mean: nodes to avoid, and what no other node would cure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamem_launch.supervise.preflight import MARK

_CLOCK_SECONDS = 2.0  # heartbeats and events of different nodes are compared by people


@dataclass(frozen=True, slots=True)
class Findings:
    """The state of the nodes of an allocation."""

    bad_nodes: dict[str, str] = field(default_factory=dict)
    """By name, why a node cannot be used."""
    unfit: str = ""
    """What is wrong everywhere; a sentence that says what to set instead."""
    failure: str = ""
    """What went wrong and may not the next time."""
    warnings: tuple[str, ...] = ()
    measured: dict[str, Any] = field(default_factory=dict)
    """By node, all that it reported."""


def read_findings(text: str, nodes: Sequence[str], *, host: str, run_dir: Path, complaint: str) -> Findings:
    """Judge what the nodes printed. ``host`` is the supervisor's own; ``complaint``, what srun and the interpreters said."""
    by_node: dict[str, dict[str, Any]] = {}
    for record in text.split(MARK)[1:]:
        # What other nodes print at the same time may follow on the same line.
        with contextlib.suppress(json.JSONDecodeError):
            found, _ = json.JSONDecoder().raw_decode(record)
            by_node.setdefault(found["node"], {}).update(found)
    silent = [node for node in nodes if node not in by_node]
    if len(silent) == len(nodes):
        last = complaint.strip().splitlines()[-1:] or ["no node said anything"]
        return Findings(unfit=f"the checks before the start ran on no node: {last[0]}; see the job's log")
    apart = [node for node in nodes if node in by_node and not by_node[node]["shared"]]
    if apart and len(apart) == len(by_node) - (host in by_node):
        return Findings(
            unfit=f"{run_dir} is not the same directory on {', '.join(apart)} as on {host}; set runs_dir to a path that all nodes "
            "share, such as one on the cluster's network file system",
            measured=by_node,
        )
    bad = {node: "; ".join(found["errors"]) for node, found in by_node.items() if found["errors"]}
    bad |= {node: f"{run_dir} is not there as on the other nodes" for node in apart}
    bad |= {node: "does not run the checks before the start" for node in silent}
    failures = [f"{node}: {found['unreachable']}" for node, found in by_node.items() if "unreachable" in found]
    warnings = [f"{node}: {text}" for node, found in by_node.items() for text in found["warnings"]]
    for node, found in by_node.items():
        offset = found.get("network", {}).get("clock_offset_seconds", 0.0)
        if abs(offset) > _CLOCK_SECONDS:
            warnings.append(f"{node}: its clock is off by {offset:+.1f} s")
    failure = f"the nodes do not reach each other ({failures[0]})" if failures and not bad else ""
    return Findings(bad, "", failure, tuple(warnings), by_node)
