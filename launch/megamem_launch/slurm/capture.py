"""What is kept of a submission so that it can be understood later: code, packages and environment, without secrets."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import megamem
from megamem_launch.slurm.scrub import scrubbed
from megamem_launch.slurm.secrets import redact, redact_text, redact_variables

CODE = Path(megamem.__file__).parent
"""Where the code that is submitted lies."""

_DIFF_BYTES = 4 << 20
_SECONDS = 20


def code_revision(directory: Path) -> tuple[dict[str, Any], str]:
    """The git revision of the checkout that holds ``directory``, and its difference from that revision.

    Returns:
        ``{"version", "directory", "revision", "branch", "remote", "dirty", "untracked"}`` and the text of a patch, which is
        cut at 4 MiB. Where there is no checkout, or no git, ``revision`` is None.
    """
    code: dict[str, Any] = {"version": megamem.__version__, "directory": str(directory), "revision": None}
    revision = _git(directory, "rev-parse", "HEAD")
    if revision is None:
        return code, ""
    untracked = (_git(directory, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    diff = _git(directory, "diff", "--no-ext-diff", "--no-color", "HEAD") or ""
    code |= {
        "revision": revision.strip(),
        "branch": (_git(directory, "branch", "--show-current") or "").strip(),
        "remote": redact_text((_git(directory, "config", "--get", "remote.origin.url") or "").strip()),
        "dirty": bool(diff or untracked),
        "untracked": untracked,
    }
    if len(diff) > _DIFF_BYTES:
        diff = diff[:_DIFF_BYTES] + "\n[cut here]\n"
    return code, redact_text(diff, os.environ)


def environment() -> dict[str, Any]:
    """Machine, interpreter, installed packages and the variables that a job inherits; secrets are redacted."""
    packages = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    return {
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "platform": platform.platform(),
        "python": sys.version,
        "executable": sys.executable,
        "directory": str(Path.cwd()),
        "packages": sorted(packages, key=str.lower),
        "variables": redact_variables(scrubbed(os.environ)),
    }


def command_line() -> str:
    """The command that this process was started with, for a person to read; secrets are redacted."""
    return redact_text(shlex.join(["megamem", *sys.argv[1:]]), os.environ) + "\n"


def records(code_directory: Path) -> dict[str, str]:
    """The files that tell where a submission came from, by name: ``command.txt``, ``code.json``, ``code.diff`` and
    ``environment.json``."""
    code, diff = code_revision(code_directory)
    return {
        "command.txt": command_line(),
        "code.json": json.dumps(redact(code), indent=1) + "\n",
        "code.diff": diff,
        "environment.json": json.dumps(environment(), indent=1) + "\n",
    }


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command; None where it fails or git is missing."""
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
