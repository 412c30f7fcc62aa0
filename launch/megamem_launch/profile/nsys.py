"""The same command again, under NVIDIA Nsight Systems."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from megamem.errors import ConfigError
from megamem_launch.profile.options import UNDER_NSYS


def under_nsys(out: Path, arguments: list[str]) -> int:
    """Run this interpreter with ``arguments`` under ``nsys profile``, which waits for the traced window and writes
    ``OUT/nsys.nsys-rep`` of all ranks of this machine; its exit code. ConfigError where nsys is not installed.
    """
    nsys = shutil.which("nsys")
    if nsys is None:
        raise ConfigError(
            "--nsys needs NVIDIA Nsight Systems, and no `nsys` is on PATH; install it, or leave --nsys out"
        )
    out.mkdir(parents=True, exist_ok=True)
    command = [nsys, "profile", "--output", str(out / "nsys"), "--force-overwrite", "true", "--trace", "cuda,nvtx,osrt"]
    command += ["--capture-range", "cudaProfilerApi", "--capture-range-end", "stop", sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | {UNDER_NSYS: "1"}).returncode
