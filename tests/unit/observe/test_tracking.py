from __future__ import annotations

import logging
import math
import socket
import sys
import time

import numpy as np
import pytest
import yaml

from megamem.errors import MegamemError
from megamem.observe.config import TrackingConfig
from megamem.observe.journal import Journal
from megamem.observe.tracking import Tracker, flatten, point_of, replay, tracking_uri

CONFIG = {"model": {"num_layers": 2, "moe": {"layers": [0, 1]}}, "tracking": {"experiment": "tests"}}
_PATIENCE = 120.0  # seconds; importing MLflow and making its database is slow on a busy machine


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "runs" / "tiny"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return path


def _tracker(run_dir, *, resume=False, params=None, **settings):
    config = TrackingConfig(**({"experiment": "tests"} | settings))
    tracker = Tracker(config, runs_dir=run_dir.parent, run_dir=run_dir, run_name=run_dir.name)
    tracker.start(flatten(CONFIG) if params is None else params, run_dir / "config.yaml", resume)
    return tracker


def _client(run_dir):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(TrackingConfig(), run_dir.parent))


def _history(run_dir, name):
    run_id = (run_dir / "mlflow_run_id").read_text().strip()
    return [(m.step, m.value) for m in _client(run_dir).get_metric_history(run_id, name)]


def _run(run_dir):
    return _client(run_dir).get_run((run_dir / "mlflow_run_id").read_text().strip())


def test_points_of_entries():
    step = {"time": 5.0, "kind": "step", "step": 3, "loss": 2.0, "grad_norm": None, "skipped": True, "note": "text"}
    assert point_of(step).metrics == {"train/loss": 2.0, "train/skipped": 1.0}
    evaluation = {"time": 5.0, "kind": "eval", "step": 3, "loss": 2.0}
    assert point_of(evaluation | {"blocked": False}).metrics == {"eval/loss": 2.0}
    assert point_of(evaluation | {"blocked": True}).metrics == {"eval_blocked/loss": 2.0}
    assert point_of({"time": 5.0, "kind": "gates", "step": 3, "gates": 1.0}).metrics == {}
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(run_dir):
    tracker = _tracker(run_dir, params=flatten(CONFIG) | {"long": "x" * 9000} | {f"p{i}": i for i in range(150)})
    for step in range(3):
        tracker.log(step, {"train/loss": np.float32(3 - step), "train/grad_norm": math.nan})
    tracker.artifact(run_dir / "config.yaml")
    tracker.finish("KILLED", timeout=_PATIENCE)
    first = _run(run_dir)
    assert first.info.status == "KILLED" and first.info.run_name == "tiny"
    assert first.data.params["model.moe.layers"] == "[0, 1]" and first.data.params["p149"] == "149"
    assert len(first.data.params["long"]) == 6000
    assert _client(run_dir).list_artifacts(first.info.run_id)[0].path == "config.yaml"
    assert list((run_dir.parent / "mlartifacts").rglob("config.yaml"))

    changed = flatten(CONFIG) | {"model.num_layers": 3}  # MLflow refuses to change a parameter: a resume must not try
    tracker = _tracker(run_dir, resume=True, params=changed)
    tracker.record({"time": time.time(), "kind": "step", "step": 3, "loss": 0.5})
    tracker.finish("FINISHED", timeout=_PATIENCE)
    second = _run(run_dir)
    assert second.info.run_id == first.info.run_id and second.info.status == "FINISHED"
    assert _history(run_dir, "train/loss") == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]
    assert _history(run_dir, "train/grad_norm") == []

    _tracker(run_dir).finish("FINISHED", timeout=_PATIENCE)  # a new start in the same directory is a new run
    assert _run(run_dir).info.run_id != first.info.run_id


def test_a_run_that_was_killed_before_its_first_checkpoint_does_not_stay_running(run_dir):
    _tracker(run_dir).finish("FINISHED", timeout=_PATIENCE)
    first = _run(run_dir).info.run_id
    _client(run_dir).update_run(first, status="RUNNING")  # as a SIGKILL leaves it
    _tracker(run_dir).finish("FINISHED", timeout=_PATIENCE)
    assert _run(run_dir).info.run_id != first
    assert _client(run_dir).get_run(first).info.status == "KILLED"


def test_replay_sends_what_was_missed_and_only_that(run_dir):
    journal = Journal(run_dir / "journal.jsonl")
    journal.start(0)
    entries = [journal.write("step", step, loss=float(step), lr=1e-3) for step in range(6)]
    evaluation = journal.write("eval", 6, loss=1.5, blocked=True)
    tracker = _tracker(run_dir)
    for entry in entries[:2] + entries[4:5]:
        tracker.record(entry)
    tracker.finish("FAILED", timeout=_PATIENCE)
    assert replay(run_dir) == 4
    assert [step for step, _ in _history(run_dir, "train/loss")] == list(range(6))
    assert _history(run_dir, "eval_blocked/loss") == [(evaluation["step"], 1.5)]
    assert _run(run_dir).info.status == "KILLED"
    journal.event("stop", 6)
    assert replay(run_dir) == 0
    assert _run(run_dir).info.status == "FINISHED"


def test_replay_of_a_run_that_was_never_tracked(run_dir):
    journal = Journal(run_dir / "journal.jsonl")
    journal.write("step", 0, loss=2.0)
    assert replay(run_dir) == 1
    assert _history(run_dir, "train/loss") == [(0, 2.0)]
    assert _run(run_dir).data.params["model.num_layers"] == "2"
    (run_dir.parent / "mlflow.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(MegamemError, match=r"does not take the run .* set tracking\.uri"):
        replay(run_dir)


def test_a_broken_database_costs_one_warning(run_dir, caplog):
    (run_dir.parent / "mlflow.db").write_bytes(b"not a database" * 1000)
    with caplog.at_level(logging.WARNING, logger="megamem"):
        tracker = _tracker(run_dir)
        for step in range(5):
            tracker.log(step, {"loss": 1.0})
        tracker.finish("FINISHED", timeout=_PATIENCE)
        tracker.log(6, {"loss": 1.0})
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("megamem")]
    assert len(messages) == 1 and "the journal goes on" in messages[0] and "mlflow.db" in messages[0]


def test_an_mlflow_that_cannot_be_imported_costs_one_warning(run_dir, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with caplog.at_level(logging.WARNING, logger="megamem"):
        tracker = _tracker(run_dir)
        tracker.log(0, {"loss": 1.0})
        tracker.finish("FINISHED", timeout=_PATIENCE)
    assert len(caplog.records) == 1 and "ModuleNotFoundError" in caplog.text


def test_a_silent_server_holds_up_neither_steps_nor_the_end(run_dir, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with caplog.at_level(logging.WARNING, logger="megamem"):
            began = time.monotonic()
            tracker = _tracker(run_dir, uri=uri)
            for step in range(20_000):  # more than the queue holds
                tracker.log(step, {"loss": 1.0})
            logged = time.monotonic()
            tracker.finish("FINISHED", timeout=0.5)
            ended = time.monotonic()
    assert logged - began < 5 and ended - logged < 2
    assert [uri in r.getMessage() for r in caplog.records if r.name.startswith("megamem")] == [True]


def test_no_mlflow_when_it_is_turned_off(run_dir):
    tracker = _tracker(run_dir, mlflow=False)
    tracker.log(0, {"loss": 1.0})
    tracker.finish("FINISHED", timeout=_PATIENCE)
    assert sorted(p.name for p in run_dir.parent.rglob("*")) == ["config.yaml", "tiny"]
