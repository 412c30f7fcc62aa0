"""Finding what `megamem launch` started."""

from __future__ import annotations

import difflib
from pathlib import Path

from megamem.errors import LaunchError
from megamem_launch import rundir


def find_launched(run: str, runs_dir: Path) -> Path:
    """The absolute directory of a run or sweep given by path or by name; LaunchError names the nearest ones that were launched."""
    for candidate in (Path(run), runs_dir / run):
        if rundir.submission_folders(candidate):
            return candidate.absolute()
        if (candidate / "journal.jsonl").is_file():
            raise LaunchError(
                f"{candidate} was not started by `megamem launch`, so it has no jobs; `megamem inspect {candidate}` shows it"
            )
    runs = sorted(path.parent.name for path in runs_dir.glob("*/launch"))
    near = difflib.get_close_matches(Path(run).name, runs, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"launched runs there: {', '.join(runs) or 'none'}"
    raise LaunchError(f"no run `{run}` here or in {runs_dir}; {hint}")


def sweep_points(run_dir: Path) -> list[Path]:
    """The runs of a sweep; empty for a run that is none."""
    sweep = rundir.read_json(rundir.launch_dir(run_dir) / "sweep.json") or {}
    return [Path(str(point["run_dir"])) for point in sweep.get("points", [])]
