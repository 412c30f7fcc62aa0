"""A checkpoint exists whole or not at all, whenever a save ends early; the earlier ones stay."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamem.errors import CheckpointError
from megamem_checkpoints import dense, directory, files, owned, rng, save

PHASES = [
    (directory, "prepare"),
    (dense, "collect"),
    (rng, "write"),
    (owned, "write_tensors"),
    (dense, "write"),
    (save, "record"),
    (save, "_manifest"),
    (save, "write_text"),
    (directory, "publish"),
]
IDS = [f"{module.__name__.rsplit('.')[-1]}.{name}" for module, name in PHASES]


def visible(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}


def fail_in(patch: pytest.MonkeyPatch, module: Any, name: str, failure: Callable[[], None], *, after: bool) -> None:
    original = getattr(module, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs) if after else None
        failure()
        return result

    patch.setattr(module, name, failing)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(action: Callable[[], None]) -> int:
    """Exit status of a forked process that runs ``action``: 0 where it returns."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(("module", "name"), PHASES, ids=IDS)
def test_disk_full_in_any_phase(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    old, new, fresh = mini_run(seed=1), mini_run(seed=2), mini_run(seed=3)
    path = old.save(1)
    with monkeypatch.context() as patch:
        fail_in(patch, module, name, disk_full, after=False)
        with pytest.raises(
            CheckpointError, match=r"step 2 was not written .*No space left on device; the one before it"
        ):
            new.save(2)
    assert visible(path.parent) == {"latest", path.name}
    fresh.load(new.checkpointer.latest())
    assert fresh.equals(old.tensors())
    fresh.load(new.save(2))
    assert fresh.equals(new.tensors())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("module", "name"), PHASES, ids=IDS)
def test_killed_in_any_phase(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: bool
) -> None:
    old, new, fresh = mini_run(seed=1), mini_run(seed=2), mini_run(seed=3)
    path = old.save(1)
    with monkeypatch.context() as patch:
        fail_in(patch, module, name, lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)
        assert in_child(lambda: new.save(2)) == signal.SIGKILL
    finished = (module, name, after) == (directory, "publish", True)
    latest = new.checkpointer.latest()
    assert latest == (path.with_name("step_00000002") if finished else path)
    fresh.load(latest)
    assert fresh.equals((new if finished else old).tensors())
    new.save(3)
    assert not [entry for entry in visible(path.parent) if entry.endswith(".tmp")]


@pytest.mark.parametrize("survivor", ["before", "between", "after"])
def test_killed_while_replacing_a_checkpoint_of_the_same_step(
    mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, survivor: str
) -> None:
    old, new, fresh = mini_run(seed=1, keep=1), mini_run(seed=2, keep=1), mini_run(seed=3)
    old.save(1)
    renames = {"before": 0, "between": 1, "after": 2}[survivor]
    rename, done = Path.rename, []

    def counting(path: Path, target: Path) -> Path:
        if len(done) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(target)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counting)
        assert in_child(lambda: new.save(1)) == signal.SIGKILL
    fresh.load(new.checkpointer.latest())
    assert fresh.equals((new if survivor == "after" else old).tensors())
    fresh.load(new.save(1))
    assert fresh.equals(new.tensors())
    assert visible(new.checkpointer.directory) == {"latest", "step_00000001"}


def test_file_size_limit_of_the_system(mini_run: Callable[..., Any]) -> None:
    run = mini_run(seed=1)
    path = run.save(1)

    def save_with_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        with pytest.raises(CheckpointError, match=r"File too large.*the one before it is untouched"):
            run.save(2)

    assert in_child(save_with_limit) == 0
    assert visible(path.parent) == {"latest", path.name}


def test_a_second_writer_is_refused_and_disturbs_nothing(mini_run: Callable[..., Any]) -> None:
    run = mini_run()
    path = run.save(1)
    theirs = path.with_name("step_00000002.tmp")
    theirs.mkdir()
    with files.writer_lock(path.parent), pytest.raises(CheckpointError, match=r"another process is writing"):
        run.save(2)
    assert theirs.is_dir()
    run.save(2)
    assert visible(path.parent) == {"latest", path.name, "step_00000002"}


def test_meta_that_is_not_json_fails_before_anything_is_written(mini_run: Callable[..., Any]) -> None:
    run = mini_run()
    run.meta["path"] = Path("x")
    with pytest.raises(CheckpointError, match=r"not JSON serializable"):
        run.save(1)
    assert not run.checkpointer.directory.exists()


def test_keeps_the_newest_and_what_latest_names(mini_run: Callable[..., Any]) -> None:
    run = mini_run(keep=2)
    for step in (1, 2, 3, 100):
        run.save(step)
    folder = run.checkpointer.directory
    assert visible(folder) == {"latest", "step_00000003", "step_00000100"}
    assert (folder / "latest").read_text() == "step_00000100\n"
    run.save(4)
    assert visible(folder) == {"latest", "step_00000003", "step_00000004", "step_00000100"}
    (folder / "latest").write_text("step_00000003\n")
    directory.prune(folder, keep=1, step=100)
    assert visible(folder) == {"latest", "step_00000003", "step_00000100"}


def test_old_checkpoints_go_only_after_success(mini_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = mini_run(keep=1)
    run.save(1)
    monkeypatch.setattr(save, "write_text", lambda *_: disk_full())
    with pytest.raises(CheckpointError):
        run.save(2)
    assert visible(run.checkpointer.directory) == {"latest", "step_00000001"}
