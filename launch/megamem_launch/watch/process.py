"""What the kernel says of the process of a rank."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from megamem.observe.heartbeat import node_name
from megamem_launch.watch.beats import Beat

STATES = {
    "T": "is stopped (SIGSTOP)",
    "t": "is held by a debugger",
    "D": "is in an uninterruptible sleep (a disk or network file system that does not answer)",
    "Z": "has ended",
    "X": "has ended",
    "gone": "is gone",
}
"""Letters of ``/proc/PID/stat`` of processes that cannot answer, in words."""
_PY_SPY_SECONDS = 10.0


def state_here(beat: Beat) -> str | None:
    """The state of a rank: a letter of ``/proc/PID/stat``, ``gone``, or None where it runs on another machine."""
    if beat.host != node_name():
        return None
    try:
        return state_in(Path(f"/proc/{beat.pid}/stat").read_text(), beat)
    except OSError:
        return "gone"


def state_in(stat: str, beat: Beat) -> str:
    """The state of a rank, from what ``/proc/PID/stat`` of its machine holds: another process may have its number by now."""
    fields = stat.rpartition(")")[2].split()  # the name of the command may hold blanks and brackets
    return fields[0] if len(fields) > 19 and int(fields[19]) == beat.start_tick else "gone"


def py_spy(pid: int) -> str | None:
    """Stacks of a process of this machine that does not answer, as JSON, read from its memory from outside; None where py-spy is
    not installed, may not look, or finds nothing."""
    program = shutil.which("py-spy")
    if program is None:
        return None
    command = [program, "dump", "--nonblocking", "--json", "--pid", str(pid)]  # to block is to stop and to wake it
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 and result.stdout.strip() else None
