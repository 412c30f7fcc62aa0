from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from megamem.errors import ConfigError, MegamemError
from megamem.observe import tracking_session
from megamem.observe.config import TrackingConfig
from megamem.observe.journal import Journal
from megamem.observe.lineage import Description, describe, tracked_model
from megamem.observe.tracking import Selection, Tracker, add_metrics, flatten, point_of, replay, tracking_uri
from megamem.observe.tracking_points import numbers
from megamem.observe.tracking_store import create_database

CONFIG = {"model": {"num_layers": 2, "moe": {"layers": [0, 1]}}, "tracking": {"experiment": "tests"}}
_PATIENCE = 120.0  # seconds; importing MLflow and making its database is slow on a busy machine


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "runs" / "tiny"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return path


def _tracker(run_dir, *, resume=False, params=None, **settings):
    config = TrackingConfig(**({"experiment": "tests", "system_metrics": False} | settings))
    tracker = Tracker(config, run_dir=run_dir)
    tracker.start(Description(params=flatten(CONFIG) if params is None else params), resume=resume)
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
    journal = Journal(run_dir / "journal.jsonl")
    tracker = _tracker(run_dir, params=flatten(CONFIG) | {"long": "x" * 9000} | {f"p{i}": i for i in range(150)})
    for step in range(3):
        journal.write("step", step, loss=np.float32(3 - step), grad_norm=math.nan)
    tracker.finish("KILLED", timeout=_PATIENCE)
    first = _run(run_dir)
    assert first.info.status == "KILLED" and first.info.run_name == "tiny"
    assert first.data.params["model.moe.layers"] == "[0, 1]" and first.data.params["p149"] == "149"
    assert len(first.data.params["long"]) == 6000
    assert _client(run_dir).list_artifacts(first.info.run_id)[0].path == "config.yaml"
    assert list((run_dir.parent / "mlartifacts").rglob("config.yaml"))

    changed = flatten(CONFIG) | {"model.num_layers": 3}  # MLflow refuses to change a parameter: a resume must not try
    journal.write("step", 3, loss=0.75)  # written after the first process, by one that could not send it
    tracker = _tracker(run_dir, resume=True, params=changed)
    journal.write("step", 4, loss=0.5)
    tracker.finish("FINISHED", timeout=_PATIENCE)
    second = _run(run_dir)
    assert second.info.run_id == first.info.run_id and second.info.status == "FINISHED"
    assert _history(run_dir, "train/loss") == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.75), (4, 0.5)]
    assert _history(run_dir, "train/grad_norm") == []

    _tracker(run_dir).finish("FINISHED", timeout=_PATIENCE)  # a new start in the same directory is a new run
    assert _run(run_dir).info.run_id != first.info.run_id
    assert _history(run_dir, "train/loss") == []


def test_a_run_that_was_killed_before_its_first_checkpoint_does_not_stay_running(run_dir):
    _tracker(run_dir).finish("FINISHED", timeout=_PATIENCE)
    first = _run(run_dir).info.run_id
    _client(run_dir).update_run(first, status="RUNNING")  # as a SIGKILL leaves it
    _tracker(run_dir).finish("FINISHED", timeout=_PATIENCE)
    assert _run(run_dir).info.run_id != first
    assert _client(run_dir).get_run(first).info.status == "KILLED"


def test_a_lost_answer_makes_no_second_run(run_dir):
    _tracker(run_dir).finish("FAILED", timeout=_PATIENCE)
    first = _run(run_dir).info.run_id
    (run_dir / "mlflow_run_id").unlink()  # made by the server, but this process never heard of it
    _tracker(run_dir, resume=True).finish("FINISHED", timeout=_PATIENCE)
    assert _run(run_dir).info.run_id == first


def test_only_every_so_many_steps_are_sent_and_the_last(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(1, 8):
        journal.write("step", step, loss=float(step))
    journal.write("eval", 7, loss=1.0, blocked=False)
    journal.event("stop", 7)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('damaged\n{"kind":"eval","step":8,"time":1.0,"loss":2.0}\n{"kind":"eval","st')
    points, end = Selection(3, 7).read(tmp_path / "journal.jsonl", 0)
    assert [point.step for point in points] == [3, 6, 7, 7, 8]
    assert end == (tmp_path / "journal.jsonl").read_bytes().rindex(b"\n") + 1
    assert Selection(3, 7).read(tmp_path / "journal.jsonl", end) == ([], end)


def test_names_that_mlflow_refuses_are_changed():
    assert numbers({"a(b)": 1, "a[b]": 2.0, "x/../y": 3, "text": "t", "nan": math.nan}) == {
        "a_b_": 1.0,
        "a_b__1": 2.0,
        "x/y": 3.0,
    }


def test_replay_sends_what_was_missed_and_only_that(run_dir):
    journal = Journal(run_dir / "journal.jsonl")
    tracker = _tracker(run_dir)
    journal.start(0)
    for step in range(3):
        journal.write("step", step, loss=float(step), lr=1e-3)
    tracker.finish("FAILED", timeout=_PATIENCE)
    for step in range(3, 6):
        journal.write("step", step, loss=float(step), lr=1e-3)
    evaluation = journal.write("eval", 6, loss=1.5, blocked=True)
    assert replay(run_dir) == 4
    assert [step for step, _ in _history(run_dir, "train/loss")] == list(range(6))
    assert _history(run_dir, "eval_blocked/loss") == [(evaluation["step"], 1.5)]
    assert _run(run_dir).info.status == "KILLED"
    journal.event("stop", 6)
    assert replay(run_dir) == 0
    assert _run(run_dir).info.status == "FINISHED"
    (run_dir / "mlflow_sync.json").write_text("{")  # torn or lost: everything again, and no measurement twice
    assert replay(run_dir) == 7
    assert [step for step, _ in _history(run_dir, "train/loss")] == list(range(6))


def test_replay_of_a_run_that_was_never_tracked(run_dir):
    journal = Journal(run_dir / "journal.jsonl")
    journal.write("step", 0, loss=2.0)
    assert replay(run_dir) == 1
    assert _history(run_dir, "train/loss") == [(0, 2.0)]
    assert _run(run_dir).data.params["model.num_layers"] == "2"
    (run_dir.parent / "mlflow.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(MegamemError, match=r"does not take the run .* set tracking\.uri"):
        replay(run_dir)


def test_numbers_added_after_the_end_change_neither_its_status_nor_its_tags(run_dir, monkeypatch):
    journal = Journal(run_dir / "journal.jsonl")
    journal.event("stop", 3)
    replay(run_dir)
    before = _run(run_dir)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr("megamem.observe.tracking_session.code_tags", lambda: {"mlflow.source.git.commit": "later"})
    add_metrics(run_dir, 3, {"eval_tasks/acc,none": 0.5})
    after = _run(run_dir)
    assert after.data.metrics == {"eval_tasks/acc_none": 0.5}
    assert after.info.status == "FINISHED" and after.info.end_time == before.info.end_time
    assert after.data.tags.get("mlflow.source.git.commit") == before.data.tags.get("mlflow.source.git.commit")


def test_a_run_that_was_stopped_for_a_requeue_has_not_finished(run_dir):
    (run_dir / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"train": {"steps": 10, "log_interval": 5}}))
    journal = Journal(run_dir / "journal.jsonl")
    for step in range(1, 8):
        journal.write("step", step, loss=1.0)
    journal.event("stop", 7)
    assert replay(run_dir) == 1
    assert _run(run_dir).info.status == "KILLED"
    journal.event("stop", 10)
    replay(run_dir)
    assert _run(run_dir).info.status == "FINISHED"


def test_a_broken_database_costs_one_warning(run_dir, caplog):
    (run_dir.parent / "mlflow.db").write_bytes(b"not a database" * 1000)
    with caplog.at_level(logging.WARNING, logger="megamem"):
        _tracker(run_dir).finish("FINISHED", timeout=_PATIENCE)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("megamem")]
    assert len(messages) == 1 and "the journal goes on" in messages[0] and "mlflow.db" in messages[0]


def test_what_a_store_missed_is_sent_when_it_is_back(run_dir, caplog, monkeypatch):
    refusals, real = iter(range(3)), tracking_session.Session.log

    def log(session, points):
        if next(refusals, None) is not None:
            raise ConnectionError("nobody there")
        real(session, points)

    monkeypatch.setattr("megamem.observe.tracking._FIRST_RETRY", 0.1)
    monkeypatch.setattr(tracking_session.Session, "log", log)
    journal = Journal(run_dir / "journal.jsonl")
    tracker = _tracker(run_dir)
    for step in (1, 2):
        journal.write("step", step, loss=float(step))
        until = time.monotonic() + _PATIENCE
        while f'"sent": {(run_dir / "journal.jsonl").stat().st_size}' not in (run_dir / "mlflow_sync.json").read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
    tracker.finish("FINISHED", timeout=_PATIENCE)
    assert _history(run_dir, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert _run(run_dir).info.status == "FINISHED"
    assert caplog.text.count("is away (ConnectionError: nobody there)") == 1


def test_an_mlflow_that_cannot_be_imported_costs_one_warning(run_dir, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with caplog.at_level(logging.WARNING, logger="megamem"):
        _tracker(run_dir).finish("FINISHED", timeout=_PATIENCE)
    assert len(caplog.records) == 1 and "ModuleNotFoundError" in caplog.text


def test_a_silent_server_does_not_hold_up_the_end(run_dir, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with caplog.at_level(logging.WARNING, logger="megamem"):
            tracker = _tracker(run_dir, uri=uri)
            began = time.monotonic()
            tracker.finish("FINISHED", timeout=0.5)
            ended = time.monotonic()
    assert ended - began < 3
    assert [uri in r.getMessage() for r in caplog.records if r.name.startswith("megamem")] == [True]


def test_no_mlflow_when_it_is_turned_off(run_dir):
    tracker = _tracker(run_dir, mlflow=False)
    tracker.artifact(run_dir / "config.yaml")
    tracker.finish("FINISHED", timeout=_PATIENCE)
    assert sorted(p.name for p in run_dir.parent.rglob("*")) == ["config.yaml", "tiny"]


def test_the_name_of_a_parent_is_checked():
    with pytest.raises(ConfigError, match=r"tracking\.parent is .* set a name without quotes"):
        TrackingConfig(parent="it's")


def test_what_a_run_is_described_by(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    data = tmp_path / "corpus"
    data.mkdir()
    (data / "data.json").write_text('{"fingerprint": "ab12", "tokens": 7, "files": {}}')
    found = describe({"a": {"b": 1}, "data": {"path": str(data)}}, {"world_size": 2})
    assert found.params == {"a.b": 1, "data.path": str(data), "environment.world_size": 2}
    assert found.tags["slurm.job_id"] == "12"
    assert found.data.name == "corpus" and found.data.digest == "ab12" and found.data.profile["tokens"] == 7
    assert describe({"data": {"path": str(tmp_path)}}).data is None
    assert tracked_model(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"steps": 4, "validation_loss": {"first": 9.0, "last": 2.5}}')
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000004\n")
    model = tracked_model(tmp_path)
    assert model.step == 4 and model.path == tmp_path / "checkpoints" / "step_00000004"
    assert model.metrics == {"eval/loss": 2.5}


def test_database_whose_making_was_killed_is_made_again(tmp_path):
    """SQLite does not undo the half of MLflow's tables, which MLflow itself would never open again."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = f"from megamem.observe.tracking_store import create_database as create; create({uri!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.glob(".mlflow.db-*/mlflow.db")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert not (tmp_path / "mlflow.db").exists()
    from mlflow.tracking import MlflowClient

    with subprocess.Popen([sys.executable, "-c", code]) as one, subprocess.Popen([sys.executable, "-c", code]) as other:
        assert one.wait(120) == other.wait(120) == 0
    assert MlflowClient(tracking_uri=uri).search_experiments()
    assert len(list(tmp_path.glob(".mlflow.db-*"))) == 1, "what was killed lies beside it, and nothing else"


def test_database_on_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(os, "link", refuse)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    create_database(uri)
    assert os.listdir(tmp_path) == ["mlflow.db"]
    assert MlflowClient(tracking_uri=uri).search_experiments()
