"""The tracker against a real ``mlflow server``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from megamem.observe.config import TrackingConfig
from megamem.observe.journal import Journal
from megamem.observe.lineage import describe
from megamem.observe.tracking import Tracker

_PATIENCE = 120.0


class _Server:
    def __init__(self, root, port):
        self.root, self.port, self.uri = root, port, f"http://127.0.0.1:{port}"
        self._process = None

    def start(self):
        store = f"sqlite:///{self.root / 'server.db'}"
        words = [
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
            "--backend-store-uri",
            store,
        ]
        command = [sys.executable, "-m", "mlflow", *words, "--artifacts-destination", str(self.root / "artifacts")]
        self._process = subprocess.Popen(
            ["sh", "-c", '"$@" & read _; kill -9 0', "sh", *command],  # ends with the test process, however that ends
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        self.stop()
        pytest.fail("the MLflow server did not start")

    def stop(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    running = _Server(tmp_path_factory.mktemp("mlflow"), port)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def client(server):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=server.uri)


def _run_dir(path):
    (path / "data").mkdir(parents=True)
    (path / "data" / "data.json").write_text('{"fingerprint": "%s", "tokens": 471722, "documents": 60}' % ("ab" * 32))
    (path / "config.yaml").write_text("name: tiny\n")
    return path


def _start(server, run_dir, *, resume=False, **settings):
    config = TrackingConfig(uri=server.uri, experiment="server", **settings)
    tracker = Tracker(config, run_dir=run_dir)
    tracker.start(describe({"train": {"seed": 1}, "data": {"path": str(run_dir / "data")}}), resume=resume)
    return tracker


def _id(run_dir):
    return (run_dir / "mlflow_run_id").read_text().strip()


def test_a_run_with_its_data_its_code_and_its_model(server, client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    run_dir = _run_dir(tmp_path / "a.run")
    journal = Journal(run_dir / "journal.jsonl")
    tracker = _start(server, run_dir)
    journal.write("step", 1, loss=3.0)
    journal.write("eval", 4, loss=2.5, blocked=False)
    checkpoint = run_dir / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text(checkpoint.name + "\n")
    (run_dir / "summary.json").write_text(
        '{"steps": 4, "parameters": {"dense": 5, "total": 5}, "validation_loss": {"last": 2.5}}'
    )
    tracker.artifact(run_dir / "summary.json")
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until and not (
        (run_dir / "mlflow_run_id").exists()
        and any(name.startswith("system/") for name in client.get_run(_id(run_dir)).data.metrics)
    ):
        time.sleep(0.2)
    tracker.finish("FINISHED", timeout=_PATIENCE)

    run = client.get_run(_id(run_dir))
    assert run.info.status == "FINISHED" and run.data.metrics["train/loss"] == 3.0
    assert "system/cpu_utilization_percentage" in run.data.metrics
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(__file__))
    if head.returncode == 0:
        assert run.data.tags["mlflow.source.git.commit"] == head.stdout.strip()
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.yaml", "summary.json"}
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "data" and used.dataset.digest == ("ab" * 32)[:36]
    assert str(run_dir / "data") in used.dataset.source and "471722" in used.dataset.profile
    (model,) = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'"
    )
    assert model.status == "READY" and model.name == "a-run" and model.params["parameters.total"] == "5"
    assert model.params["checkpoint"] == str(checkpoint) and model.tags["mlflow.model.isExternal"] == "true"
    assert [(m.key, m.value, m.dataset_name) for m in model.metrics] == [("eval/loss", 2.5, "data")]
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]

    tracker = _start(server, run_dir, resume=True)  # a requeue that finds nothing left to do
    tracker.finish("FINISHED", timeout=_PATIENCE)
    again = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'")
    assert len(again) == 1 and _id(run_dir) == run.info.run_id


def test_points_of_a_sweep_that_start_together_share_one_parent(server, client, tmp_path):
    run_dirs = [_run_dir(tmp_path / f"point-{i}") for i in range(4)]

    def point(run_dir):
        Journal(run_dir / "journal.jsonl").close()
        _start(server, run_dir, parent="rates", system_metrics=False).finish("FINISHED", timeout=_PATIENCE)

    threads = [threading.Thread(target=point, args=(run_dir,)) for run_dir in run_dirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parents = {client.get_run(_id(run_dir)).data.tags["mlflow.parentRunId"] for run_dir in run_dirs}
    assert len(parents) == 1
    experiment = client.get_experiment_by_name("server").experiment_id
    named = client.search_runs([experiment], "attributes.run_name = 'rates'")
    assert [run.info.run_id for run in named] == list(parents) and named[0].info.status == "FINISHED"


def test_a_server_that_goes_away_misses_nothing(server, client, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("megamem.observe.tracking._FIRST_RETRY", 0.5)
    run_dir = _run_dir(tmp_path / "survivor")
    journal = Journal(run_dir / "journal.jsonl")
    tracker = _start(server, run_dir, system_metrics=False)
    journal.write("step", 1, loss=1.0)
    until = time.monotonic() + _PATIENCE
    while not (run_dir / "mlflow_run_id").exists() and time.monotonic() < until:
        time.sleep(0.1)
    run_id = _id(run_dir)
    server.stop()
    journal.write("step", 2, loss=2.0)
    while "is away" not in caplog.text and time.monotonic() < until:
        time.sleep(0.1)
    began = time.monotonic()
    journal.write("step", 3, loss=3.0)
    assert time.monotonic() - began < 1  # the run does not notice
    server.start()
    journal.write("step", 4, loss=4.0)
    tracker.finish("KILLED", timeout=_PATIENCE)
    journal.write("step", 5, loss=5.0)  # and a requeue sends what the end of the process cut off
    _start(server, run_dir, resume=True, system_metrics=False).finish("FINISHED", timeout=_PATIENCE)
    history = [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")]
    assert history == [(i, float(i)) for i in range(1, 6)]
    assert _id(run_dir) == run_id and client.get_run(run_id).info.status == "FINISHED"
