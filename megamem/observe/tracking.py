"""MLflow, at arm's length: one background thread talks to it, and its failures never reach training.

The journal is the source of truth. Whatever a broken or slow tracker missed, :func:`replay` sends later.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megamem.config import build
from megamem.errors import MegamemError
from megamem.observe.config import TrackingConfig
from megamem.observe.journal import Entry, plain, read_journal

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_QUEUE_ITEMS = 10_000
_SEND_INTERVAL = 1.0  # seconds; a request per step would cost short steps more than it tells
_METRICS_PER_BATCH = 1000  # MLflow's limits per request
_PARAMS_PER_BATCH = 100
_KEY_LENGTH = 250
_PARAM_LENGTH = 6000
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
    numbers = {k: v for k, v in entry.items() if k not in ("time", "kind", "step", "blocked")} if prefix else {}
    return Point(entry["step"], entry["time"], _numbers({f"{prefix}{k}": v for k, v in numbers.items()}))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted parameters: ``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class Tracker:
    """Sends the measurements of a run to MLflow. Used by one rank; no method raises or waits for MLflow, except that
    :meth:`finish` waits some seconds for what is still queued.

    With ``config.mlflow`` false it does nothing.
    """

    def __init__(self, config: TrackingConfig, *, runs_dir: Path, run_dir: Path, run_name: str) -> None:
        self._config = config
        self._runs_dir, self._run_dir, self._run_name = runs_dir, run_dir, run_name
        self._queue: queue.Queue[Point | Path | Status] = queue.Queue(maxsize=_QUEUE_ITEMS)
        self._thread: threading.Thread | None = None
        self._finishing = threading.Event()
        self._broken = not config.mlflow

    def start(self, params: Mapping[str, Any], config_file: Path, resume: bool) -> None:
        """Open the MLflow run in the background; with ``resume``, the one that this run directory had before.

        ``params``: flat settings, cut to MLflow's lengths. ``config_file``: the resolved configuration, kept as artifact.
        """
        if self._broken:
            return
        self._queue.put(config_file)
        self._thread = threading.Thread(target=self._work, args=(dict(params), resume), name="mlflow", daemon=True)
        self._thread.start()

    def record(self, entry: Entry) -> None:
        """Send the numbers of a journal entry (of kind ``step`` or ``eval``)."""
        self._put(point_of(entry))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send numbers that are in no journal entry. Values that are not finite are left out."""
        self._put(Point(step, time.time(), _numbers(plain(metrics))))

    def artifact(self, path: Path) -> None:
        """Send a copy of a file, in the state that it will have when its turn comes."""
        self._put(path)

    def finish(self, status: Status, *, timeout: float = 30.0) -> None:
        """End the MLflow run once everything queued is sent, waiting at most ``timeout`` seconds."""
        if self._thread is None:
            return
        self._put(status)
        self._finishing.set()
        self._thread.join(min(timeout, 1.0) if self._broken else timeout)
        if self._thread.is_alive():
            self._give_up(f"it did not take the last measurements within {timeout:g} s")
        self._thread = None

    def _put(self, item: Point | Path | Status) -> None:
        if self._broken or self._thread is None:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"it fell {_QUEUE_ITEMS} measurements behind")

    def _give_up(self, reason: str) -> None:
        if not self._broken:
            self._broken = True
            logger.warning(
                "MLflow (%s) gets nothing more of this run, since %s; the journal goes on, and "
                "`megamem inspect %s --sync-mlflow` sends what is missing",
                tracking_uri(self._config, self._runs_dir), reason, self._run_dir,
            )  # fmt: skip

    def _work(self, params: dict[str, Any], resume: bool) -> None:
        try:
            session = _Session(self._config, self._runs_dir, self._run_dir, self._run_name, params, resume)
            with session.system_metrics():
                while not self._broken:
                    items = self._drain()
                    session.log([item for item in items if isinstance(item, Point)])
                    for item in items:
                        if isinstance(item, Path):
                            session.artifact(item)
                    if isinstance(items[-1], str):
                        return session.terminate(items[-1])
        except Exception as error:  # whatever a server, a database or a broken installation comes up with
            self._give_up(f"it raised {_describe(error)}")

    def _drain(self) -> list[Point | Path | Status]:
        """The next items: what is queued some time after the first one came, up to the end of the run."""
        items = [self._queue.get()]
        self._finishing.wait(_SEND_INTERVAL)
        while not isinstance(items[-1], str):
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return items


def replay(run_dir: Path) -> int:
    """Send to MLflow what the journal of ``run_dir`` has and its MLflow run lacks; returns the number of entries sent.

    For runs that have ended: it also closes the MLflow run. Reads ``tracking`` from ``config.yaml``. Raises MegamemError
    if MLflow cannot be reached.
    """
    points = [point for point in map(point_of, read_journal(run_dir / "journal.jsonl")) if point.metrics]
    with _ended_run(run_dir) as session:
        missing = session.missing(points)
        session.log(missing)
        for name in ("config.yaml", "report.html"):
            if (run_dir / name).exists():
                session.artifact(run_dir / name)
    return len(missing)


def add_metrics(run_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Send numbers that are in no journal to the MLflow run of a run that has ended, which keeps its status.

    Characters that MLflow refuses in a name become underscores. Raises MegamemError if MLflow cannot be reached.
    """
    named: dict[str, float] = {}
    for name, value in metrics.items():
        plain_name = "/".join(part for part in re.sub(r"[^\w\-./ ]", "_", name).split("/") if part.strip("."))
        named[plain_name if plain_name not in named else f"{plain_name}_{len(named)}"] = value
    with _ended_run(run_dir) as session:
        session.log([Point(step, time.time(), _numbers(plain(named)))])


@contextlib.contextmanager
def _ended_run(run_dir: Path) -> Iterator[_Session]:
    """The MLflow run of ``run_dir``, which ends as its journal does; MegamemError for whatever MLflow raises."""
    run_dir = run_dir.resolve()
    config_file = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise MegamemError(
            f"{config_file} cannot be read ({getattr(error, 'problem', error)}): restore the resolved settings of the run"
        ) from None
    tracking = build(TrackingConfig, config.get("tracking", {}), "tracking")
    endings: dict[str, Status] = {"start": "KILLED", "stop": "FINISHED", "fail": "FAILED"}
    ending = [endings[e["event"]] for e in read_journal(run_dir / "journal.jsonl") if e.get("event") in endings]
    try:
        session = _Session(tracking, run_dir.parent, run_dir, run_dir.name, flatten(config), resume=True)
        yield session
        session.terminate(ending[-1] if ending else "KILLED")
    except Exception as error:
        uri = tracking_uri(tracking, run_dir.parent)
        raise MegamemError(
            f"MLflow at {uri} does not take the run ({_describe(error)}): set tracking.uri to a store that works"
        ) from error


def tracking_uri(config: TrackingConfig, runs_dir: Path) -> str:
    """Where measurements go: ``tracking.uri``, or a SQLite file in the directory of runs."""
    return config.uri or f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


class _Session:
    """An open MLflow run. Every method may raise whatever MLflow raises."""

    def __init__(
        self,
        config: TrackingConfig,
        runs_dir: Path,
        run_dir: Path,
        run_name: str,
        params: Mapping[str, Any],
        resume: bool,
    ) -> None:
        # Read by mlflow when it is imported. Its own defaults retry for minutes and phone home.
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "ERROR",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow"):  # after the import, which sets its own level
            logging.getLogger(name).setLevel(logging.WARNING)

        self._uri = tracking_uri(config, runs_dir)
        if not config.uri:
            runs_dir.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=self._uri)
        id_file = run_dir / _RUN_ID_FILE
        run_id = id_file.read_text().strip() if id_file.exists() else ""
        known = bool(run_id) and self._exists(run_id)
        if known and resume:
            self._client.update_run(run_id, status="RUNNING")
        else:
            if known and self._client.get_run(run_id).info.status == "RUNNING":  # killed before its first checkpoint
                self._client.set_terminated(run_id, "KILLED")
            run_id = self._create(config, runs_dir, run_name, params)
            id_file.write_text(run_id + "\n")
        self._run_id = run_id

    @contextlib.contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Let MLflow measure processors, memory, disk and network in a thread of its own."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self._run_id, tracking_uri=self._uri, resume_logging=True)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def log(self, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(p.time * 1000), p.step) for p in points for name, value in p.metrics.items()]
        for i in range(0, len(metrics), _METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[i : i + _METRICS_PER_BATCH])

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self._run_id, str(path))

    def terminate(self, status: Status) -> None:
        self._client.set_terminated(self._run_id, status)

    def missing(self, points: list[Point]) -> list[Point]:
        """The points, less those whose metrics the run already has at that step."""
        have: dict[str, set[int]] = defaultdict(set)
        for name in {name for point in points for name in point.metrics}:
            have[name] = {metric.step for metric in self._client.get_metric_history(self._run_id, name)}
        lacking = [Point(p.step, p.time, {k: v for k, v in p.metrics.items() if p.step not in have[k]}) for p in points]
        return [point for point in lacking if point.metrics]

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _create(self, config: TrackingConfig, runs_dir: Path, run_name: str, params: Mapping[str, Any]) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(config.experiment)
        if experiment is None:
            artifacts = None if config.uri else (runs_dir.resolve() / "mlartifacts").as_uri()
            with contextlib.suppress(MlflowException):  # another run may create it at the same moment
                self._client.create_experiment(config.experiment, artifact_location=artifacts)
            experiment = self._client.get_experiment_by_name(config.experiment)
        run_id = self._client.create_run(experiment.experiment_id, run_name=run_name).info.run_id
        settings = [Param(key[:_KEY_LENGTH], str(value)[:_PARAM_LENGTH]) for key, value in params.items()]
        for i in range(0, len(settings), _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=settings[i : i + _PARAMS_PER_BATCH])
        return run_id


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        key[:_KEY_LENGTH]: float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _describe(error: Exception) -> str:
    lines = str(error).splitlines()  # the database layer appends whole statements
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
