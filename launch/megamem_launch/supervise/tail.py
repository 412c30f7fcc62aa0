"""What rank 0 prints, on the supervisor's own output too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

STDOUT, STDERR = 1, 2


class Tail:
    """Copies what is appended to the log of rank 0 in ``logs`` to standard output."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._offset = 0

    def copy(self) -> None:
        """Print what is new. The file is opened anew each time: only then does a network file system ask its server."""
        with contextlib.suppress(OSError):  # of a file system that answers the next time
            path = next(self._logs.glob("*-0.log"), None)
            if path is None:
                return
            with path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            self._offset += len(new)
            put(STDOUT, new)


def put(stream: int, data: bytes) -> None:
    """Write to a standard stream, past Python's buffers. That nobody reads it any more, as when the terminal has gone, is no reason
    to end."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(stream, data) :]
