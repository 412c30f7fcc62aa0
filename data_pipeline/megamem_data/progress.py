"""Progress of ``prepare`` on standard error: rich bars on a terminal, plain lines elsewhere, nothing when switched
off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 15.0


class Reporter:
    """Writes lines and stages; ``enabled=False`` silences everything."""

    def __init__(self, enabled: bool) -> None:
        self._console = Console(stderr=True, quiet=not enabled, soft_wrap=True)

    def line(self, text: str) -> None:
        """Write one line."""
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """A stage of ``total`` units (None when unknown); yields the function that reports units done."""
        if self._console.is_terminal and not self._console.quiet:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(label, total=total)
                yield lambda done: progress.advance(task, done)
            return

        start = last = time.monotonic()
        count = 0

        def advance(done: int) -> None:
            nonlocal last, count
            count += done
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                of = f" of {total:,}" if total else ""
                self.line(f"{label}: {count:,}{of} {unit} after {last - start:.0f} s")

        yield advance
        self.line(f"{label}: {count:,} {unit} in {time.monotonic() - start:.1f} s")
