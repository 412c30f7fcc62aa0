"""Where the launcher keeps what it knows of a run, below its directory. Needs only the standard library.

An *incarnation* is one start of a run's ranks: ``JOB.RESTART.ATTEMPT``, the job's id, how often the scheduler restarted it, and
how often its supervisor restarted the ranks inside one allocation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megamem.errors import LaunchError
from megamem.files import write_text

INCARNATION = "MEGAMEM_INCARNATION"
"""Environment variable that tells ranks which incarnation they are; set by the supervisor alone."""
STOP, SAVE = "STOP", "SAVE"
"""Files in the directory of a run that a person makes: save and end; save and go on."""


def launch_dir(run_dir: Path) -> Path:
    """All that the launcher keeps of a run."""
    return run_dir / "launch"


def submission_folders(run_dir: Path) -> list[Path]:
    """What is kept of each submission of a run, ``submission-1`` first."""
    found = (path for path in launch_dir(run_dir).glob("submission-*") if _number(path).isdigit())
    return sorted(found, key=lambda path: int(_number(path)))


def next_submission_folder(run_dir: Path) -> Path:
    """Where the next submission of a run will be kept; not made."""
    last = submission_folders(run_dir)[-1:]
    return launch_dir(run_dir) / f"submission-{int(_number(last[0])) + 1 if last else 1}"


def _number(folder: Path) -> str:
    return folder.name.removeprefix("submission-")


def jobs_file(run_dir: Path) -> Path:
    """One line of JSON per submitted job."""
    return launch_dir(run_dir) / "jobs.jsonl"


def incarnations_file(run_dir: Path) -> Path:
    """Starts and ends of incarnations, one line of JSON each."""
    return launch_dir(run_dir) / "incarnations.jsonl"


def excluded_file(run_dir: Path) -> Path:
    """Nodes that the run avoids, and why."""
    return launch_dir(run_dir) / "excluded.json"


def lease_file(run_dir: Path) -> Path:
    """Which incarnation may write the run."""
    return launch_dir(run_dir) / "lease.json"


def finished_file(run_dir: Path) -> Path:
    """Exists when the run has trained all its steps."""
    return launch_dir(run_dir) / "finished"


def cancelled_file(run_dir: Path) -> Path:
    """Exists when a person cancelled the run."""
    return launch_dir(run_dir) / "cancelled"


def stopped_file(run_dir: Path) -> Path:
    """Exists when jobs that are still in the queue are not to go on with the run, until somebody submits or requeues it: a person
    stopped it, or must mend something first."""
    return launch_dir(run_dir) / "stopped"


def stop_lies(run_dir: Path) -> str:
    """Why a run is not to start, in a sentence: a person's wish that it stops is still there. Empty where it is not."""
    stop = run_dir / STOP
    return f"{STOP} lies in {run_dir}, so it does not train; remove {stop} to train" if stop.exists() else ""


def live_dir(run_dir: Path, incarnation: str) -> Path:
    """Heartbeats of an incarnation, and what its supervisor and its ranks tell each other."""
    return launch_dir(run_dir) / "live" / incarnation


def dump_dir(run_dir: Path, incarnation: str) -> Path:
    """Stacks of all ranks of an incarnation that hung."""
    return launch_dir(run_dir) / "dumps" / incarnation


def log_dir(run_dir: Path, incarnation: str) -> Path:
    """Output of every rank of an incarnation."""
    return launch_dir(run_dir) / "logs" / incarnation


def preflight_file(run_dir: Path, incarnation: str) -> Path:
    """What the checks before an incarnation found on each node."""
    return launch_dir(run_dir) / f"preflight-{incarnation}.json"


def control_file(run_dir: Path, incarnation: str) -> Path:
    """What the supervisor asks of the ranks: ``{"request": "none" | "stop" | "save", "why": "time limit"}``."""
    return live_dir(run_dir, incarnation) / "control.json"


def outcome_file(run_dir: Path, incarnation: str) -> Path:
    """What rank 0 says at a clean end: ``{"outcome": "finished" | "stopped", "step": 12, "why": "time limit"}``."""
    return live_dir(run_dir, incarnation) / "outcome.json"


def incarnation() -> str | None:
    """The incarnation that this process belongs to; None without a supervisor."""
    return os.environ.get(INCARNATION) or None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file, or a writer is about to replace it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace ``path``, whose directory is made, with ``value``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value) + "\n")


def append_json(path: Path, value: dict[str, Any]) -> None:
    """Append ``value`` as one line, in one write, to a file that is made with its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, json.dumps(value).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a torn last line, and a file that is not there, are no error."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [value for value in values if isinstance(value, dict)]


def check_lease(run_dir: Path) -> None:
    """LaunchError where another incarnation has taken the run over from the one that this process belongs to."""
    own = incarnation()
    lease = read_json(lease_file(run_dir)) if own else None
    if lease is not None and lease.get("incarnation") != own:
        raise LaunchError(
            f"{run_dir} was taken over by incarnation {lease.get('incarnation')} on {lease.get('host')}; this one, {own}, ends "
            "without writing anything more"
        )
