"""Where SLURM's programs are, and which Debian packages have them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

PACKAGES = {
    "slurmctld": ("slurmctld",),
    "slurmd": ("slurmd",),
    "slurm-client": ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"),
    "munge": ("munged",),
}
"""Programs by the Debian package that installs them."""


def search_path() -> str:
    """PATH, with the directories of daemons that an ordinary user's PATH leaves out."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*folders, "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"]))


def program(name: str) -> str:
    """Full path of one of the programs; FileNotFoundError where it is not installed."""
    path = shutil.which(name, path=search_path())
    if path is None:
        package = next((package for package, names in PACKAGES.items() if name in names), name)
        raise FileNotFoundError(f"{name} is not installed; it comes with Debian's package {package}")
    return path


def missing_packages() -> list[str]:
    """Debian packages that have to be installed before a cluster can start; empty where all are there."""
    path = search_path()
    return [
        package for package, names in PACKAGES.items() if any(shutil.which(name, path=path) is None for name in names)
    ]


def slurm_version() -> tuple[int, int]:
    """Major and minor version, e.g. (22, 5)."""
    output = subprocess.run([program("slurmd"), "-V"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\d+)\.(\d+)", output)
    if match is None:
        raise RuntimeError(f"slurmd -V printed no version: {output!r}")
    return int(match[1]), int(match[2])
