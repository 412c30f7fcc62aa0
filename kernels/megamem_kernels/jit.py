"""Compilation of CPU kernels, and where compiled code is kept.

numba keeps compiled code until the *file* of a function changes, and does not see that a function which it compiled into it
lives in another file. Code that outlives the source it was made of would round other bits than its neighbour's. So megamem's code
lies in a folder of its own for every state of its sources: under ``$NUMBA_CACHE_DIR``, ``$XDG_CACHE_HOME`` or ``~/.cache``, or in
the system's temporary directory where these cannot be written.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numba


def njit(function: Any = None, **options: Any) -> Any:
    """:func:`numba.njit`, whose ``cache=True`` takes the folder of this state of the sources."""
    if function is None:
        return lambda function: njit(function, **options)
    if not options.get("cache"):
        return numba.njit(**options)(function)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = cache_folder()
    try:
        return numba.njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before


@cache
def cache_folder() -> str:
    """The folder, made if it can be."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    wanted = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    places = [Path(wanted or Path.home() / ".cache"), Path(tempfile.gettempdir()) / f"megamem-{os.getuid()}"]
    for place in places:
        folder = place / "megamem" / digest.hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return str(folder)
    return tempfile.mkdtemp(prefix="megamem-")
