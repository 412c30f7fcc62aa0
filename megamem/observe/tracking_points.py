"""What a tracker shows of a journal, and how far it has got."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamem.files import write_text
from megamem.observe.journal import Entry

_KEY_LENGTH = 250
_READ_BYTES = 4 << 20  # of a journal at once: after a long outage there is much to send
_STATE_FILE = "mlflow_sync.json"
_RUN_ID_FILE = "mlflow_run_id"


@dataclass(frozen=True, slots=True)
class Point:
    """Numbers of one step, under the names that the tracker shows."""

    step: int
    time: float
    """Seconds since the epoch."""
    metrics: dict[str, float]


def point_of(entry: Entry) -> Point:
    """What a tracker shows of a journal entry: the numbers of steps and evaluations; no metrics for any other kind."""
    kind = entry["kind"]
    prefix = {"step": "train/", "eval": "eval_blocked/" if entry.get("blocked") else "eval/"}.get(kind)
    own = {k: v for k, v in entry.items() if k not in ("time", "kind", "step", "blocked")} if prefix else {}
    return Point(entry["step"], entry["time"], numbers({f"{prefix}{k}": v for k, v in own.items()}))


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite ones of some values. Characters that MLflow refuses in a name become underscores."""
    named: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            plain_name = "/".join(part for part in re.sub(r"[^\w\-./ ]", "_", name).split("/") if part.strip("."))
            unique = plain_name if plain_name not in named else f"{plain_name}_{len(named)}"
            named[unique[:_KEY_LENGTH]] = float(value)
    return named


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted parameters: ``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@dataclass(frozen=True, slots=True)
class Selection:
    """Which steps a tracker shows; evaluations always are."""

    log_interval: int = 1
    last_step: int = 0

    def read(self, journal: Path, offset: int) -> tuple[list[Point], int]:
        """Points of the whole lines of a journal from byte ``offset`` on, and the offset behind those that were read.

        Damaged lines are passed over. Overtaken measurements are among the points.
        """
        with journal.open("rb") as file:
            file.seek(offset)
            lines = file.readlines(_READ_BYTES)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # still being written
        points = []
        for line in lines:
            try:
                entry = json.loads(line)
                wanted = entry["kind"] != "step" or entry["step"] % self.log_interval == 0
                if (wanted or entry["step"] == self.last_step) and (point := point_of(entry)).metrics:
                    points.append(point)
            except (ValueError, KeyError, TypeError):
                continue
        return points, offset + sum(map(len, lines))


@dataclass(slots=True)
class Sync:
    """How far MLflow has got with the journal of a run; lies beside it, so that whatever was missed is sent later.

    An entry may be sent twice, never left out: MLflow keeps one of two equal measurements.
    """

    key: str
    """Tag of the MLflow run, by which it is found again where its making was not answered."""
    begin: int = 0
    """Byte of the journal where this MLflow run begins."""
    sent: int = 0
    """Byte of the journal up to which MLflow has it."""
    superseded: str = ""
    """MLflow run that this directory had before and that may still be called running."""

    @classmethod
    def open(cls, run_dir: Path, *, resume: bool) -> Sync:
        """The state of a run directory; a fresh one, from the end of its journal on, unless ``resume``."""
        if resume:
            try:
                return cls(**json.loads((run_dir / _STATE_FILE).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                return cls(uuid.uuid4().hex)  # everything is sent again, which changes nothing where it was
        journal, id_file = run_dir / "journal.jsonl", run_dir / _RUN_ID_FILE
        size = journal.stat().st_size if journal.exists() else 0
        sync = cls(uuid.uuid4().hex, size, size, read_run_id(run_dir))
        sync.save(run_dir)
        id_file.unlink(missing_ok=True)
        return sync

    def save(self, run_dir: Path) -> None:
        """Write it into the directory of the run."""
        write_text(run_dir / _STATE_FILE, json.dumps(asdict(self)) + "\n")


def read_run_id(run_dir: Path) -> str:
    """Id of the MLflow run of a run directory; empty where there is none."""
    path = run_dir / _RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def write_run_id(run_dir: Path, run_id: str) -> None:
    """Remember the MLflow run of a run directory."""
    write_text(run_dir / _RUN_ID_FILE, run_id + "\n")
