"""Running SLURM's own commands. Their answers are plain text whose form does not depend on the user's environment."""

from __future__ import annotations

import os
import subprocess

from megamem.errors import LaunchError

_PERSONAL = ("SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_", "SACCT_")
"""Variables by which users change what a command selects and prints (SQUEUE_USERS, SCANCEL_INTERACTIVE, ...)."""

_UNREACHABLE = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "slurm backup controller in standby mode",
    "communications connection failure",
    "zero bytes were transmitted or received",
    "job can not be altered now, try again later",
)
"""What the commands say when the answer would have been another one a moment later."""


class SchedulerUnavailable(LaunchError):
    """The controller did not answer: nothing is known about any job."""


class SchedulerRefusal(LaunchError):
    """The controller answered no; ``complaint`` is what the command printed."""

    def __init__(self, command: str, complaint: str) -> None:
        super().__init__(f"`{command}` was refused: {complaint}")
        self.complaint = complaint


def run(*command: str, timeout: float = 60.0) -> str:
    """Standard output of a SLURM command. Times in it are seconds since the epoch, words are English.

    Raises SchedulerRefusal when it fails, SchedulerUnavailable when the controller cannot be reached or takes longer than
    ``timeout`` seconds, and LaunchError when SLURM's commands are not installed or not configured here.
    """
    shown = " ".join(word for word in command if not word.startswith("--"))  # lists of fields are nothing for people
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=_environment(), check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            f"`{command[0]}` is not installed here; run this where SLURM's commands are, such as a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerUnavailable(f"`{shown}` did not answer within {timeout:.0f} s; try again later") from None
    if answer.returncode == 0:
        return answer.stdout
    complaint = sentence(answer.stderr or answer.stdout) or f"exit code {answer.returncode}"
    if any(text in complaint.lower() for text in _UNREACHABLE):
        raise SchedulerUnavailable(f"SLURM did not answer `{shown}` ({complaint}); try again later")
    if "unable to process configuration file" in complaint.lower() or "fatal: " in answer.stderr:
        raise LaunchError(
            f"`{command[0]}` does not know its cluster ({complaint}); set SLURM_CONF or ask who runs the cluster"
        )
    raise SchedulerRefusal(shown, complaint)


def sentence(complaint: str) -> str:
    """What a command complained of in one line, without the prefixes ``scancel: error:`` and ``slurm_load_jobs error:``."""
    lines = dict.fromkeys(line.strip() for line in complaint.splitlines())
    return "; ".join(line.rpartition("error: ")[2] for line in lines if line)


def _environment() -> dict[str, str]:
    """The environment without personal settings of the commands."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PERSONAL)}
    return kept | {"SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
