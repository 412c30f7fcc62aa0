"""What a run that trains is asked by files, and when they go."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamem.train.control import Request
from megamem_launch import rundir
from megamem_launch.requests import Requests


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Requests:
    monkeypatch.setenv(rundir.INCARNATION, "7.0.0")
    monkeypatch.setattr("megamem_launch.requests._INTERVAL", 0.0)
    return Requests(tmp_path)


def test_save_is_removed_when_it_is_done(requests: Requests, tmp_path: Path) -> None:
    save = tmp_path / rundir.SAVE
    save.touch()
    assert [requests.poll(), requests.poll()] == [Request.SAVE, Request.NONE] and save.exists()
    requests.saved()
    assert not save.exists() and requests.poll() is Request.NONE


def test_a_save_that_cannot_be_removed_is_obeyed_once(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / rundir.SAVE).touch()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert requests.poll() is Request.SAVE
    requests.saved()
    assert requests.poll() is Request.NONE


def test_a_person_who_stops_counts_before_the_supervisor(requests: Requests, tmp_path: Path) -> None:
    rundir.write_json(rundir.control_file(tmp_path, "7.0.0"), {"request": "stop", "why": "the time limit is near"})
    assert requests.poll() is Request.STOP and requests.why == "the time limit is near"
    stop = tmp_path / rundir.STOP
    stop.touch()
    requests.obeyed(finished=False)
    assert stop.exists()  # nobody has been told
    requests.heed()
    assert requests.why == rundir.STOP
    requests.obeyed(finished=False)
    assert not stop.exists()


def test_the_end_of_training_leaves_nothing_to_stop(requests: Requests, tmp_path: Path) -> None:
    (tmp_path / rundir.STOP).touch()
    requests.obeyed(finished=True)
    assert not (tmp_path / rundir.STOP).exists()


def test_a_wish_to_save_that_nobody_looked_at_goes_with_the_run(requests: Requests, tmp_path: Path) -> None:
    (tmp_path / rundir.SAVE).touch()
    requests.obeyed(finished=False)
    assert not (tmp_path / rundir.SAVE).exists()


def test_a_file_system_that_does_not_answer_wants_nothing(requests: Requests, tmp_path: Path) -> None:
    rundir.control_file(tmp_path, "7.0.0").mkdir(parents=True)  # reading it is an OSError
    assert requests.poll() is Request.NONE
