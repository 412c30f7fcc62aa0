from __future__ import annotations

import io

import pytest
from rich.console import Console

from megamem.observe.progress import Progress, describe_step, format_bytes, format_count, format_duration

STEP = {
    "loss": 3.21987,
    "lr": 1e-3,
    "grad_norm": 0.98765,
    "tokens_per_second": 12345.6,
    "memory_bytes": 3 * 2**29,
    "lookups": 4096,
    "unique_ratio": 0.2503,
    "patch_ratio": 0.04,
    "stall_seconds": 0.012,
    "step_seconds": 0.4,
    "skipped": 0,
}


def _console(**options):
    return Console(file=io.StringIO(), width=180, **options)


def test_a_step_reads_as_one_line():
    line = describe_step(STEP)
    assert line == (
        "loss 3.2199 · lr 1.00e-03 · norm 0.988 · tok/s 12.3k · mem 1.5 GiB · unique 25% · patched 4% · stall 12 ms (3.0%)"
    )
    assert "unique" not in describe_step(STEP | {"lookups": 0})  # a model without tables
    assert describe_step({"loss": None, "lr": 0.1, "skipped": 1}) == "lr 1.00e-01 · SKIPPED"
    assert describe_step({"stall_seconds": 0.1, "step_seconds": 0.0}) == ""


def test_plain_lines_come_at_the_interval_and_at_the_end():
    console = _console()
    with Progress(7, True, log_interval=3, console=console) as progress:
        progress.event("resumed at step 0 from [checkpoints/step_00000000]")
        for done in range(1, 8):
            progress.update(done, STEP)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "resumed at step 0 from [checkpoints/step_00000000]"  # not read as markup
    assert [line.split(" · ")[0] for line in lines[1:]] == ["step 3/7", "step 6/7", "step 7/7"]
    assert lines[1].endswith("eta 0:02") and "eta" not in lines[3]


def test_long_lines_are_not_wrapped_in_a_log():
    console = Console(file=io.StringIO(), width=40)
    with Progress(9, True, console=console) as progress:
        progress.update(1, STEP)
    assert len(console.file.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_live_line_with_events_above():
    console = _console(force_terminal=True, color_system=None)
    with Progress(10, True, console=console) as progress:
        progress.update(4, STEP)
        progress.event("checkpoint at step 4")
        progress.update(5, STEP)
    text = console.file.getvalue()
    assert "checkpoint at step 4\n" in text
    last = text[text.rindex("step 5/10") :]
    assert "loss 3.2199" in last and "stall 12 ms (3.0%)" in last and "eta 0:02" in last
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden and comes back


def test_the_terminal_is_restored_when_training_raises():
    console = _console(force_terminal=True)
    with pytest.raises(RuntimeError), Progress(10, True, console=console):
        raise RuntimeError
    assert console.file.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_are_silent(terminal):
    console = _console(force_terminal=terminal)
    with Progress(3, False, console=console) as progress:
        progress.update(3, STEP)
        progress.event("checkpoint")
    assert console.file.getvalue() == ""


def test_units():
    assert [format_count(v) for v in (0, 12, 999.4, 999.6, 1234567, 2.5e12)] == [
        "0",
        "12",
        "999",
        "1k",
        "1.23M",
        "2.5T",
    ]
    assert [format_bytes(v) for v in (0, 1023, 1024, 3 * 2**29, 200 * 2**20)] == [
        "0 B", "1023 B", "1 KiB", "1.5 GiB", "200 MiB"
    ]  # fmt: skip
    assert [format_duration(v) for v in (0, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
