"""What a run says on the terminal: one live line where there is one, plain lines in a file or a batch job's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as LiveProgress
from rich.table import Column

_SMOOTHING = 0.9


class Progress:
    """Shows the numbers of a run, on the one rank that has ``enabled`` set.

    On a terminal a live line shows the last step; elsewhere every ``log_interval``-th step prints a line. Use it as a
    context manager, so that the terminal is restored when training raises.
    """

    def __init__(
        self, total_steps: int, enabled: bool, *, log_interval: int = 1, console: Console | None = None
    ) -> None:
        self._total, self._interval = total_steps, log_interval
        self._console = console or Console()
        self._enabled = enabled
        self._step_seconds = 0.0
        self._live: LiveProgress | None = None
        self._task = TaskID(0)
        if enabled and self._console.is_terminal:
            self._live = LiveProgress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[numbers]}", markup=False, table_column=Column()),  # wraps where it is narrow
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._live.add_task("", total=total_steps, numbers="")

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps_done: int, metrics: Mapping[str, Any]) -> None:
        """Show the numbers of a step (values of the journal's kind ``step``) after ``steps_done`` steps of the run."""
        if not self._enabled:
            return
        seconds = metrics.get("step_seconds") or 0.0
        previous = self._step_seconds or seconds
        self._step_seconds = _SMOOTHING * previous + (1 - _SMOOTHING) * seconds
        remaining = (self._total - steps_done) * self._step_seconds
        numbers = describe_step(metrics) + (f" · eta {format_duration(remaining)}" if remaining > 0 else "")
        if self._live is not None:
            self._live.update(self._task, completed=steps_done, numbers=numbers)
        elif steps_done % self._interval == 0 or steps_done >= self._total:
            self._print(f"step {steps_done}/{self._total} · {numbers}")

    def event(self, text: str) -> None:
        """Print a line that stays: a resume, a checkpoint, an evaluation, a skipped step."""
        if self._enabled:
            self._print(text)

    def close(self) -> None:
        """Leave the last live line as it is and restore the terminal."""
        if self._live is not None:
            self._live.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


def describe_step(metrics: Mapping[str, Any]) -> str:
    """The numbers of a step as one line; those that are absent or null are left out."""
    parts = [
        f"{label} {text(metrics[key])}" for key, label, text in _FIELDS if isinstance(metrics.get(key), (int, float))
    ]
    stall, seconds = metrics.get("stall_seconds"), metrics.get("step_seconds")
    if metrics.get("lookups"):  # without tables these are zero in every step
        parts += [f"{label} {metrics[key]:.0%}" for key, label in _RATIOS if metrics.get(key) is not None]
    if stall is not None and seconds:
        parts.append(f"stall {stall * 1e3:.0f} ms ({stall / seconds:.1%})")
    if metrics.get("skipped"):
        parts.append("SKIPPED")
    return " · ".join(parts)


def format_count(value: float) -> str:
    """A count with a decimal prefix: 1234567 to ``1.23M``."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def format_bytes(value: float) -> str:
    """Bytes with a binary prefix: 3 * 2**29 to ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1023.5:
            return f"{value:.3g} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def format_duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_FIELDS = (
    ("loss", "loss", "{:.4f}".format),
    ("lr", "lr", "{:.2e}".format),
    ("grad_norm", "norm", "{:.3g}".format),
    ("tokens_per_second", "tok/s", format_count),
    ("memory_bytes", "mem", format_bytes),
)
_RATIOS = (("unique_ratio", "unique"), ("patch_ratio", "patched"))
