"""``megamem report``: the HTML page of a run, or of several side by side."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megamem.errors import MegamemError
from megamem_launch.slurm.launched import sweep_points
from megamem_launch.verbs.inspect import find_run
from megamem_launch.verbs.parse import parse


@dataclass
class Arguments:
    """Write the report of a run, finished or not, as one HTML file that needs no network; of several runs, a comparison.

    A run's page: losses, rates, speed and its stalls, where the time of steps goes, memory, use of the tables, gates over a
    text sample, and what happened. The comparison: curves over each other, headline numbers, settings that differ.

    Examples:
      megamem report quickstart
      megamem report runs/quickstart --out quickstart.html --open
      megamem report base wider deeper --out comparison.html
      megamem report rates                   the points of a sweep that have begun
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Directories of runs or sweeps, or their names below --runs-dir."""
    out: Path | None = None
    """File to write; by default report.html in the run, or comparison.html in --runs-dir."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    open: bool = False
    """Show the page in a browser."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, argv, "report")
    if not arguments.runs:
        raise MegamemError("no run was named; give one or more, as in `megamem report runs/quickstart`")
    runs_dir = Path(arguments.runs_dir)
    runs = [found for run in arguments.runs for found in _find(run, runs_dir)]
    from megamem.observe.report import build_comparison, build_report

    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if len(runs) == 1:
        page = build_report(runs[0], arguments.out)
    else:
        page = build_comparison(runs, arguments.out or runs_dir / "comparison.html")
    print(f"report: {page.resolve()}")
    if arguments.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def _find(run: str, runs_dir: Path) -> list[Path]:
    """A run, or the points of a sweep that have begun."""
    points = next((found for place in (Path(run), runs_dir / run) if (found := sweep_points(place))), [])
    if not points:
        return [find_run(run, runs_dir)]
    begun = [point for point in points if (point / "journal.jsonl").is_file()]
    if not begun:
        raise MegamemError(
            f"none of the {len(points)} points of sweep {run} has begun to train; see `megamem launch status {run}`"
        )
    return begun
