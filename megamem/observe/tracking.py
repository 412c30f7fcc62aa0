"""MLflow, at arm's length: one background thread follows the journal of a run and sends it what is new.

The journal is the source of truth. While MLflow is away nothing is lost: the thread tries again, and goes on where MLflow had
got to; what it still misses at the end of the process is sent by the next start of the run, or by :func:`replay`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megamem.config import build
from megamem.errors import MegamemError
from megamem.observe.config import TrackingConfig
from megamem.observe.journal import plain, read_journal
from megamem.observe.lineage import Description, describe, tracked_model
from megamem.observe.tracking_points import Point, Selection, Sync, flatten, numbers, point_of
from megamem.observe.tracking_session import Session, Status, describe_error
from megamem.observe.tracking_store import tracking_uri

__all__ = [
    "Point",
    "Selection",
    "Tracker",
    "add_metrics",
    "flatten",
    "log_numbers",
    "point_of",
    "replay",
    "tracking_uri",
]

logger = logging.getLogger(__name__)

_SEND_INTERVAL = 1.0  # seconds; a request per step would cost short steps more than it tells
_FIRST_RETRY = 2.0  # seconds after which a store that failed is tried again; doubles
_LONGEST_RETRY = 120.0


class Tracker:
    """Keeps MLflow up to date with the journal of a run. Used by one rank; no method raises or waits for MLflow, except that
    :meth:`finish` waits some seconds for what is not sent yet.

    With ``config.mlflow`` false it does nothing.

    Args:
        config: Where to.
        run_dir: The run, whose ``journal.jsonl`` is followed.
        selection: Which steps are sent.
    """

    def __init__(self, config: TrackingConfig, *, run_dir: Path, selection: Selection | None = None) -> None:
        self._config, self._run_dir = config, run_dir.resolve()
        self._selection = selection or Selection()
        self._artifacts: deque[Path] = deque()
        self._thread: threading.Thread | None = None
        self._status: Status | None = None
        self._ending = threading.Event()
        self._away = False

    def start(self, description: Description, *, resume: bool) -> None:
        """Open the MLflow run in the background; with ``resume``, the one that this run directory had before.

        Without ``resume`` what the journal has so far stays out of it. The resolved configuration is kept as an artifact.
        """
        if not self._config.mlflow:
            return
        try:
            sync = Sync.open(self._run_dir, resume=resume)
        except OSError as error:
            return self._warn(error)
        self._artifacts.append(self._run_dir / "config.yaml")
        self._thread = threading.Thread(target=self._work, args=(description, sync), name="mlflow", daemon=True)
        self._thread.start()

    def artifact(self, path: Path) -> None:
        """Send a copy of a file, in the state that it will have when its turn comes."""
        if self._thread is not None:
            self._artifacts.append(path)

    def finish(self, status: Status, *, timeout: float = 30.0) -> None:
        """End the MLflow run once everything is sent, waiting at most ``timeout`` seconds.

        A run that has finished leaves its last checkpoint there as a logged model, by reference.
        """
        if self._thread is None:
            return
        self._status = status
        self._ending.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"it did not take the last measurements within {timeout:g} s"))
        self._thread = None

    def _work(self, description: Description, sync: Sync) -> None:
        delay = _FIRST_RETRY
        while True:
            last = self._ending.is_set()
            try:
                session = Session(self._config, self._run_dir, description, sync)
                session.catch_up(self._selection)
                if self._away:
                    self._away, delay = False, _FIRST_RETRY
                    logger.info("MLflow (%s) is back", tracking_uri(self._config, self._run_dir.parent))
                with session.system_metrics():
                    return self._follow(session)
            except Exception as error:  # whatever a server, a database or a broken installation comes up with
                self._warn(error)
            if last:
                return
            self._ending.wait(delay)
            delay = min(2 * delay, _LONGEST_RETRY)

    def _follow(self, session: Session) -> None:
        """Send what comes until the end of the run."""
        refused: list[Path] = []
        while True:
            status = self._status  # read before the journal, all of which it then covers
            session.catch_up(self._selection)
            while self._artifacts:
                if not session.artifact(self._artifacts[0]):
                    refused.append(self._artifacts[0])
                self._artifacts.popleft()
            if status is not None:
                for path in refused:
                    session.artifact(path)
                if status == "FINISHED" and (model := tracked_model(self._run_dir)):
                    session.model(model)
                return session.terminate(status)
            self._ending.wait(_SEND_INTERVAL)

    def _warn(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            logger.warning(
                "MLflow (%s) is away (%s); the journal goes on, and what is missing is sent when it is back, by the next start of "
                "the run, or by `megamem inspect %s --sync-mlflow`",
                tracking_uri(self._config, self._run_dir.parent), describe_error(error), self._run_dir,
            )  # fmt: skip


def replay(run_dir: Path) -> int:
    """Send to MLflow what the journal of ``run_dir`` has and its MLflow run lacks; returns the number of entries sent.

    For runs that have ended: it also closes the MLflow run. Reads ``tracking`` from ``config.yaml``. Raises MegamemError
    if MLflow cannot be reached.
    """
    with _ended_run(run_dir) as (session, selection, status):
        count = session.catch_up(selection)
        for name in ("config.yaml", "summary.json", "report.html"):
            if (run_dir / name).exists():
                session.artifact(run_dir / name)
        if status == "FINISHED" and (model := tracked_model(run_dir)):
            session.model(model)
    return count


def add_metrics(run_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Send numbers that are in no journal to the MLflow run of a run that has ended, which keeps its status.

    Characters that MLflow refuses in a name become underscores. Raises MegamemError if MLflow cannot be reached.
    """
    with _ended_run(run_dir) as (session, _, _):
        session.log([Point(step, time.time(), numbers(plain(metrics)))])


def log_numbers(
    folder: Path, settings: Mapping[str, Any], metrics: Mapping[str, float], *, step: int, source: str, runs_dir: Path
) -> None:
    """Make a finished MLflow run of numbers that no journal has, a new one every time; ``folder`` keeps the id of the last.

    Args:
        folder: Where they were written; names the run.
        settings: Nested plain values, with ``tracking``: the run's parameters.
        metrics: As for :func:`add_metrics`.
        step: That they are shown at.
        source: Command that they come from.
        runs_dir: Directory of runs, where MLflow's SQLite file is unless ``tracking.uri`` is set.

    Raises:
        MegamemError: MLflow cannot be reached.
    """
    tracking = build(TrackingConfig, settings.get("tracking", {}), "tracking")
    with _told(tracking, runs_dir):
        description, sync = describe(settings, source=source), Sync.open(folder, resume=False)
        session = Session(tracking, folder.resolve(), description, sync, live=False, runs_dir=runs_dir)
        session.log([Point(step, time.time(), numbers(plain(metrics)))])
        session.terminate("FINISHED")


@contextlib.contextmanager
def _told(tracking: TrackingConfig, runs_dir: Path) -> Iterator[None]:
    """MegamemError for whatever MLflow raises."""
    try:
        yield
    except Exception as error:
        raise MegamemError(
            f"MLflow at {tracking_uri(tracking, runs_dir)} does not take the run ({describe_error(error)}): set tracking.uri to a "
            "store that works"
        ) from error


@contextlib.contextmanager
def _ended_run(run_dir: Path) -> Iterator[tuple[Session, Selection, Status]]:
    """The MLflow run of ``run_dir``, which ends as its journal does; MegamemError for whatever MLflow raises."""
    run_dir = run_dir.resolve()
    config_file = run_dir / "config.yaml"
    try:
        config: dict[str, Any] = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise MegamemError(
            f"{config_file} cannot be read ({getattr(error, 'problem', error)}): restore the resolved settings of the run"
        ) from None
    tracking = build(TrackingConfig, config.get("tracking", {}), "tracking")
    train = config.get("train", {})
    selection = Selection(train.get("log_interval", 1), train.get("steps", 0))
    status = _ending(run_dir, selection.last_step)
    with _told(tracking, run_dir.parent):
        session = Session(tracking, run_dir, describe(config), Sync.open(run_dir, resume=True), live=False)
        yield session, selection, status
        session.terminate(status)


def _ending(run_dir: Path, steps: int) -> Status:
    """How the journal of a run ends; a stop before the last of ``steps`` is one that a resume goes on from."""
    status: Status = "KILLED"
    for entry in read_journal(run_dir / "journal.jsonl"):
        match entry.get("event"):
            case "start":
                status = "KILLED"
            case "fail":
                status = "FAILED"
            case "stop":
                status = "FINISHED" if entry["step"] >= steps else "KILLED"
    return status
