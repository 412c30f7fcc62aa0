"""``megamem inspect``: the headline numbers of a run, and its report."""

from __future__ import annotations

import difflib
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from megamem.errors import MegamemError
from megamem_launch.verbs.parse import parse


@dataclass
class Arguments:
    """Look at a run, finished or not: print its headline numbers and write RUN/report.html.

    The report is one file that needs no network: curves, gates over a text sample, use of the tables, events, settings.

    Examples:
      megamem inspect quickstart
      megamem inspect runs/quickstart --open
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of a run, or its name below --runs-dir."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    open: bool = False
    """Show the report in a browser."""
    sync_mlflow: bool = False
    """Send to MLflow what its run lacks, when tracking broke or was off; only for a run that has ended."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, argv, "inspect")
    run_dir = find_run(arguments.run, Path(arguments.runs_dir))
    from megamem.observe.journal import read_journal
    from megamem.observe.report import build_report
    from megamem.observe.report_numbers import headlines, read_summary

    report = build_report(run_dir)
    console = Console()
    table = Table(title=run_dir.resolve().name, title_justify="left", show_header=False, box=None)
    for style in ("", "bold", "dim"):
        table.add_column(style=style)
    for headline in headlines(read_summary(run_dir, read_journal(run_dir / "journal.jsonl"))):
        table.add_row(headline.label, headline.value, headline.note)
    console.print(table)
    console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)
    if arguments.sync_mlflow:
        from megamem.observe.tracking import replay

        console.print(f"MLflow: {replay(run_dir)} journal entries sent", highlight=False)
    if arguments.open:
        webbrowser.open(report.resolve().as_uri())
    return 0


def find_run(run: str, runs_dir: Path) -> Path:
    """The directory of a run given by path or by name; MegamemError names the nearest runs that exist."""
    for candidate in (Path(run), runs_dir / run):
        if (candidate / "journal.jsonl").is_file():
            return candidate
    runs = sorted(path.parent.name for path in runs_dir.glob("*/journal.jsonl"))
    near = difflib.get_close_matches(Path(run).name, runs, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"runs there: {', '.join(runs) or 'none'}"
    raise MegamemError(f"no run `{run}` here or in {runs_dir} (a run has a journal.jsonl); {hint}")
