"""An open MLflow run: all calls of MLflow are here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from megamem.observe.config import TrackingConfig
from megamem.observe.lineage import Description, TrackedData, TrackedModel, code_tags
from megamem.observe.tracking_points import Point, Selection, Sync, read_run_id, write_run_id
from megamem.observe.tracking_store import create_database, database_file, tracking_uri

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_METRICS_PER_BATCH = 1000  # MLflow's limits per request
_PARAMS_PER_BATCH = 100
_KEY_LENGTH = 250
_PARAM_LENGTH = 6000
_DIGEST_LENGTH = 36
_KEY_TAG = "megamem.key"
_PARENT_TAG = "megamem.parent"


class Session:
    """The MLflow run of a run directory, found again or made. Every method may raise whatever MLflow raises.

    Args:
        config: Where to.
        run_dir: The run; ``mlflow_run_id`` in it names its MLflow run.
        description: Settings, which are logged once; code and data, logged at every opening.
        sync: How far MLflow has got; kept up to date.
        live: The run is training: it becomes RUNNING, and its tags tell of this process. Else only new ones are set.
        runs_dir: The directory of runs; None where ``run_dir`` lies in it.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        description: Description,
        sync: Sync,
        *,
        live: bool = True,
        runs_dir: Path | None = None,
    ) -> None:
        _prepare_environment()
        from mlflow.tracking import MlflowClient

        # After the import, which sets its own levels. urllib3 would warn of every retry while a server is away.
        for name, level in {"alembic": "WARNING", "mlflow": "WARNING", "urllib3.connectionpool": "ERROR"}.items():
            logging.getLogger(name).setLevel(level)
        self._config, self._run_dir, self._sync = config, run_dir, sync
        self._runs_dir = runs_dir or run_dir.parent
        self._uri = tracking_uri(config, self._runs_dir)
        create_database(self._uri)
        self._client = MlflowClient(tracking_uri=self._uri)
        self._data = description.data
        self._refused: set[str] = set()
        self._experiment = self._find_experiment()
        run_id = read_run_id(run_dir)
        self._run_id = run_id if run_id and self._is_active(run_id) else self._find() or self._create()
        write_run_id(run_dir, self._run_id)
        self._supersede()
        self._describe(description, live)

    def _describe(self, description: Description, live: bool) -> None:
        from mlflow.entities import Param, RunTag

        client, run = self._client, self._client.get_run(self._run_id)
        if live and run.info.status != "RUNNING":
            client.update_run(self._run_id, status="RUNNING")
        tags = description.tags | code_tags()
        if self._config.parent:
            tags["mlflow.parentRunId"] = self._parent()
        new_tags = [RunTag(key, value) for key, value in tags.items() if live or key not in run.data.tags]
        client.log_batch(self._run_id, tags=new_tags)
        known = run.data.params  # MLflow refuses to change one: a resume keeps the first
        settings = {key[:_KEY_LENGTH]: str(value)[:_PARAM_LENGTH] for key, value in description.params.items()}
        new = [Param(key, value) for key, value in settings.items() if key not in known]
        for i in range(0, len(new), _PARAMS_PER_BATCH):
            client.log_batch(self._run_id, params=new[i : i + _PARAMS_PER_BATCH])
        if (data := description.data) is not None:
            self.attempt(f"data {data.path}", lambda: self._log_data(data))

    @contextlib.contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Let MLflow measure processors, memory, disk and network in a thread of its own."""
        if not self._config.system_metrics:
            yield
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self._run_id, tracking_uri=self._uri, resume_logging=True)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def catch_up(self, selection: Selection) -> int:
        """Send what the journal has and MLflow lacks; returns the number of entries."""
        journal, count = self._run_dir / "journal.jsonl", 0
        if not journal.exists():
            return 0
        if journal.stat().st_size < self._sync.sent:  # begun anew
            self._sync.sent = self._sync.begin = 0
        while True:
            points, end = selection.read(journal, self._sync.sent)
            if end == self._sync.sent:
                return count
            self.log(points)
            count += len(points)
            self._sync.sent = end
            if points:  # else the same lines may be read again, which costs less than a write each second
                self._sync.save(self._run_dir)

    def log(self, points: list[Point]) -> None:
        """Send numbers."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(p.time * 1000), p.step) for p in points for name, value in p.metrics.items()]
        for i in range(0, len(metrics), _METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[i : i + _METRICS_PER_BATCH])

    def attempt(self, what: str, send: Callable[[], None]) -> bool:
        """Send something that a store may refuse without harm to the measurements; the first refusal is a warning."""
        try:
            send()
        except Exception as error:  # whatever a server and its artifact store come up with
            if what not in self._refused:
                self._refused.add(what)
                logger.warning("MLflow (%s) did not take %s: %s", self._uri, what, describe_error(error))
            return False
        return True

    def artifact(self, path: Path) -> bool:
        """Send a copy of a file; whether it was taken."""
        return self.attempt(path.name, lambda: self._client.log_artifact(self._run_id, str(path)))

    def model(self, model: TrackedModel) -> bool:
        """Log the model that the run ended with, once per step: its place, numbers, and the run and data it comes from."""
        return self.attempt(f"the model of step {model.step}", lambda: self._log_model(model))

    def terminate(self, status: Status) -> None:
        """End the MLflow run, unless it has ended like that."""
        if self._client.get_run(self._run_id).info.status != status:
            self._client.set_terminated(self._run_id, status)

    def _log_data(self, data: TrackedData) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=data.name,
            digest=data.digest[:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": data.path.as_uri()}),
            profile=json.dumps(data.profile),
        )
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _log_model(self, model: TrackedModel) -> None:
        from mlflow.entities import LoggedModelOutput, Metric

        logged = self._client.search_logged_models(
            [self._experiment], filter_string=f"source_run_id = '{self._run_id}'"
        )
        if any(one.params.get("step") == str(model.step) for one in logged):
            return
        new = self._client.create_logged_model(
            self._experiment,
            name=re.sub(r"[/:.%\"']", "-", self._run_dir.name),
            source_run_id=self._run_id,
            tags={"mlflow.model.isExternal": "true", "megamem.checkpoint": model.path.as_uri()},
            params={key: str(value)[:_PARAM_LENGTH] for key, value in model.params.items()},
            model_type="megamem",
        )
        self._client.finalize_logged_model(new.model_id, "READY")
        self._client.log_outputs(self._run_id, [LoggedModelOutput(new.model_id, model.step)])
        now, data = int(time.time() * 1000), self._data
        name, digest = (data.name, data.digest[:_DIGEST_LENGTH]) if data else (None, None)
        metrics = [
            Metric(key, value, now, model.step, new.model_id, name, digest) for key, value in model.metrics.items()
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def _find_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._config.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            database = database_file(self._uri)  # MLflow's own choice for one is the directory of the process
            artifacts = (database.parent / "mlartifacts").as_uri() if database else None
            with contextlib.suppress(MlflowException):  # another run may create it at the same moment
                self._client.create_experiment(name, artifact_location=artifacts)
            experiment = self._client.get_experiment_by_name(name)
        return str(experiment.experiment_id)

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _find(self) -> str:
        return self._search(_KEY_TAG, self._sync.key)

    def _search(self, tag: str, value: str) -> str:
        """Id of the first run of the experiment with that tag; empty where there is none."""
        found = self._client.search_runs(
            [self._experiment], f"tags.`{tag}` = '{value}'", max_results=1, order_by=["attributes.start_time ASC"]
        )
        return str(found[0].info.run_id) if found else ""

    def _create(self) -> str:
        self._sync.sent = self._sync.begin  # a store that does not know the run has nothing of it
        self._sync.save(self._run_dir)
        tags = {_KEY_TAG: self._sync.key}
        run = self._client.create_run(self._experiment, run_name=self._run_dir.name, tags=tags)
        return str(run.info.run_id)

    def _supersede(self) -> None:
        """A run that was killed before its first checkpoint and begun again must not stay running."""
        before = self._sync.superseded
        if not before:
            return
        if self._is_active(before) and self._client.get_run(before).info.status == "RUNNING":
            self._client.set_terminated(before, "KILLED")
        self._sync.superseded = ""
        self._sync.save(self._run_dir)

    def _parent(self) -> str:
        """Id of the run that this one is shown under: a heading, ended as soon as it is made.

        The lock lets one of several points of a sweep make it; they share the directory of runs.
        """
        name = self._config.parent
        with (self._runs_dir / ".mlflow_parent.lock").open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: two headings at worst
                fcntl.flock(lock, fcntl.LOCK_EX)
            found = self._search(_PARENT_TAG, name)
            if not found:
                run = self._client.create_run(self._experiment, run_name=name, tags={_PARENT_TAG: name})
                found = str(run.info.run_id)
                self._client.set_terminated(found)
            return found


def describe_error(error: Exception) -> str:
    """Class and first line, shortened: the database layer appends whole statements, the network layer its whole history."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 200)}" if lines else type(error).__name__


def _prepare_environment() -> None:
    """What MLflow reads when it is imported: its own defaults retry for minutes, which is the tracker's part, and phone home."""
    defaults: dict[str, Any] = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
