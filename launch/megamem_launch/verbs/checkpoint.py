"""``megamem checkpoint``: list, check, compare and delete the checkpoints of a run."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from megamem.config import at_least
from megamem.errors import CheckpointError
from megamem_launch.verbs.checkpoint_arguments import (
    Arguments,
    DiffArguments,
    ListArguments,
    PruneArguments,
    VerifyArguments,
)
from megamem_launch.verbs.parse import parse

_SHOWN = 20
"""Lines of each kind that ``diff`` prints; ``--json`` has all."""

_PRUNE_THREADS = 4
"""Files of a checkpoint that ``prune`` reads at once before it keeps it."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    actions: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
        "ls": (ListArguments, _list),
        "verify": (VerifyArguments, _verify),
        "diff": (DiffArguments, _diff),
        "prune": (PruneArguments, _prune),
    }
    if not argv or argv[0] not in actions:
        parse(Arguments, argv[:1], "checkpoint")  # ends the process: help, or what is wrong
    arguments, action = actions[argv[0]]
    return action(parse(arguments, argv[1:], f"checkpoint {argv[0]}"))


def _list(arguments: ListArguments) -> int:
    from megamem_checkpoints.directory import leftovers
    from megamem_checkpoints.listing import disk_usage, list_checkpoints

    named = arguments.runs_dir / arguments.run
    directory = _directory(named if named.is_dir() and not arguments.run.exists() else arguments.run)
    found = list_checkpoints(directory)
    unfinished = leftovers(directory)
    size, _ = disk_usage([directory])
    if arguments.json:
        _print_json(
            directory=str(directory),
            bytes=size,
            checkpoints=[asdict(one) | {"path": str(one.path)} for one in found],
            unfinished=[path.name for path in unfinished],
        )
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("step", "age", "size", "own", "ranks", "tables"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layout")
    table.add_column("")
    for one in found:
        marks = (["[green]<- latest[/]"] if one.latest else []) + (["[red]damaged[/]"] if one.problem else [])
        cells = [_step_name(one.path), _age(time.time() - one.saved), decimal(one.bytes), decimal(one.own_bytes)]
        if one.step is not None:
            tables = f"{one.tables}{f' (+{one.incremental_tables})' if one.incremental_tables else ''}"
            cells += [str(one.world_size), tables, one.layout or "dp"]
        else:
            cells += ["", "", ""]
        table.add_row(*cells, " ".join(marks))
    console = Console(highlight=False)
    console.print(f"{directory}: {len(found)} checkpoints, {decimal(size)} on disk", markup=False, soft_wrap=True)
    console.print(table)
    for one in found:
        if one.problem:
            console.print(one.problem, markup=False, soft_wrap=True)
    for path in unfinished:
        console.print(f"{path.name}: a save under way, or left by a killed one", markup=False, soft_wrap=True)
    return 0


def _verify(arguments: VerifyArguments) -> int:
    at_least(arguments, 1, "threads")
    from megamem_checkpoints.directory import steps
    from megamem_checkpoints.integrity import Verification
    from megamem_checkpoints.manifest import FILE_NAME

    path = arguments.path
    paths = [path] if (path / FILE_NAME).is_file() else steps(_directory(path))
    if not paths:
        raise CheckpointError(
            f"{path} has no checkpoint, only what unfinished saves or deletions left; nothing was verified"
        )
    verification = Verification(paths)
    with _bar("reading", verification.bytes, shown=not arguments.json, in_bytes=True) as advance:
        results = verification.run(threads=arguments.threads, advance=advance)
    damaged = any(result.damaged for result in results)
    if arguments.json:
        _print_json(ok=not damaged, checkpoints=[asdict(result) | {"path": str(result.path)} for result in results])
    else:
        for result in results:
            verdict = f"{len(result.damaged)} DAMAGED" if result.damaged else "whole"
            if result.gone:
                verdict = "gone: it was deleted meanwhile"
            print(f"{result.path}: {result.files} files, {decimal(result.bytes)}, {verdict}")
            for problem in result.damaged.values():
                print(f"  {problem}", file=sys.stderr)
    return 2 if damaged else 0


def _diff(arguments: DiffArguments) -> int:
    from megamem_checkpoints.diff import compare_checkpoints, size_of_work
    from megamem_checkpoints.directory import find_checkpoint
    from megamem_checkpoints.reader import CheckpointReader

    a, b = (CheckpointReader(find_checkpoint(path)) for path in (arguments.a, arguments.b))
    with _bar("comparing", size_of_work(a, b), shown=not arguments.json) as advance:
        found = compare_checkpoints(a, b, advance=advance)
    if arguments.json:
        sides = {name: {"path": str(one.path), "step": one.step} for name, one in (("a", a), ("b", b))}
        _print_json(equal=found.equal, **sides, **asdict(found))
        return 0 if found.equal else 1
    for side, reader in (("A", a), ("B", b)):
        print(f"{side}: {reader.path}, step {reader.step}")
    _lines("only in A", found.only_in_a)
    _lines("only in B", found.only_in_b)
    _lines(
        "tensors that differ, by at most",
        [f"{one.name}  {_short(one.largest)}  {one.note}".rstrip() for one in found.dense],
    )
    _lines(
        "tables that differ",
        [
            f"{one.name}  {one.rows_changed:,} of {one.rows:,} rows by at most {_short(one.largest)}, "
            f"state of {one.state_changed:,}  {one.note}".rstrip()
            for one in found.tables
        ],
    )
    _lines("settings that differ", [f"{name}  {json.dumps(a)}  {json.dumps(b)}" for name, a, b in found.settings])
    print("the same bit for bit" if found.equal else "different")
    return 0 if found.equal else 1


def _prune(arguments: PruneArguments) -> int:
    at_least(arguments, 1, "keep")
    at_least(arguments, 0, "keep_every")
    from megamem_checkpoints import directory as directories
    from megamem_checkpoints.integrity import Verification
    from megamem_checkpoints.listing import disk_usage

    def whole(path: Path) -> bool:
        """By every byte: what stays must be good where others go for it."""
        return directories.is_whole(path) and not Verification([path]).run(threads=_PRUNE_THREADS)[0].damaged

    directory = _directory(arguments.run)
    with contextlib.nullcontext() if arguments.dry_run else _alone(directory):
        doomed = directories.leftovers(directory)
        doomed += directories.prunable(directory, keep=arguments.keep, keep_every=arguments.keep_every, whole=whole)
        _, freed = disk_usage(doomed)
        for path in () if arguments.dry_run else doomed:
            directories.delete(path)
    if arguments.json:
        names = [path.name for path in doomed]
        _print_json(directory=str(directory), deleted=not arguments.dry_run, paths=names, bytes=freed)
        return 0
    for path in doomed:
        print(path)
    verb = "would go" if arguments.dry_run else "deleted"
    print(f"{len(doomed)} directories {verb}, {decimal(freed)} {'would be ' if arguments.dry_run else ''}freed")
    return 0


def _directory(run: Path) -> Path:
    """Where the checkpoints of a run are; CheckpointError where there are none."""
    from megamem_checkpoints.directory import leftovers, steps

    for directory in (run / "checkpoints", run):
        if directory.is_dir() and (steps(directory) or leftovers(directory)):
            return directory
    if run.name.startswith("step_") and run.is_dir():
        raise CheckpointError(
            f"{run} has no checkpoint: its manifest.json is missing, so that a save was not completed or the file was lost; "
            "name another one"
        )
    raise CheckpointError(f"{run} has no checkpoints; name the directory of a run, or its directory of checkpoints")


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold what a training run holds, and what a save does; CheckpointError where somebody else has it."""
    from megamem_checkpoints.files import writer_lock

    with contextlib.ExitStack() as stack:
        if (directory.parent / ".lock").exists():
            stack.enter_context(writer_lock(directory.parent, doing="training"))
        stack.enter_context(writer_lock(directory))
        yield


@contextlib.contextmanager
def _bar(label: str, total: int, *, shown: bool, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, where that is a terminal; yields the function that reports what is done."""
    console = Console(stderr=True)
    amount = DownloadColumn() if in_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    disabled = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=disabled) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)


def _print_json(**values: Any) -> None:
    print(json.dumps(values, indent=1))


def _lines(title: str, lines: list[str]) -> None:
    if lines:
        print(f"{title} ({len(lines)}):")
        for line in lines[:_SHOWN]:
            print(f"  {line}")
        if len(lines) > _SHOWN:
            print(f"  and {len(lines) - _SHOWN} more (--json has all)")


def _short(largest: float | None) -> str:
    return "(not a number)" if largest is None else f"{largest:.3e}"


def _step_name(path: Path) -> str:
    return path.name.removeprefix("step_").lstrip("0") or "0"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0, seconds):.0f} s"
