"""The journal of a run: one JSON object per line, the source of truth for reports and for replay into a tracker.

A journal is appended to by every incarnation of a run (its first start and each resume). An incarnation begins with the
event ``start``, whose step is the first one that it will take: measurements that an earlier incarnation made of that
step or a later one were overtaken, and readers drop them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamem.errors import DataError

logger = logging.getLogger(__name__)

Entry = dict[str, Any]


class Journal:
    """Appends entries to ``path``. Each entry is one unbuffered write, so a kill can tear no more than the last line.

    An entry that the disk does not take (full, over quota) is lost, and a warning says so: training goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._losing = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._file.truncate(_whole_lines(self._file))

    def write(self, kind: str, step: int, /, **values: Any) -> Entry:
        """Append ``{"time", "kind", "step", **values}`` and return it as a reader will see it.

        ``time`` is in seconds since the epoch; ``values`` go through :func:`plain`.
        """
        entry = {"time": round(time.time(), 3), "kind": kind, "step": int(step), **plain(values)}
        self._append(json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        return entry

    def _append(self, line: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that is almost full takes a part first
                line = line[self._file.write(line) :]
            self._losing = False
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # half a line would garble the next one
            if not self._losing:
                self._losing = True
                logger.warning("%s cannot be written (%s): measurements are lost until it can", self._path, error)

    def event(self, name: str, step: int, /, **details: Any) -> Entry:
        """Append an entry of kind ``event``. The names that readers know: start, skip, checkpoint, checkpoint_failed,
        new_memories, offload, stop_requested, save_requested, stop, fail."""
        return self.write("event", step, event=name, **details)

    def start(self, first_step: int, /, **details: Any) -> Entry:
        """Begin an incarnation that will take ``first_step`` next: earlier measurements from there on are overtaken.

        ``details`` of a training run: ``steps_done``, ``layout`` (``world_size`` and the degrees above 1), ``incarnation``.
        """
        return self.event("start", first_step, **details)

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()


def read_journal(path: Path, *, overtaken: bool = False) -> list[Entry]:
    """The entries of a journal in the order of writing, without a torn last line.

    Measurements that a resume overtook are left out unless ``overtaken`` is set; events are history and all stay.
    Raises DataError if the file is missing or a line in it is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): name the directory of a run that was started"
        ) from None
    entries: list[Entry] = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            entry = json.loads(line)
            is_start = entry["kind"] == "event" and entry["event"] == "start"
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} line {number} is damaged: remove that line to read the rest") from None
        if is_start and not overtaken:
            entries = [e for e in entries if e["kind"] == "event" or e["step"] < step]
        entries.append(entry)
    return entries


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numpy and torch numbers as Python's, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays alike
        return plain(value.tolist())
    return str(value)


def _whole_lines(file: Any) -> int:
    """Bytes of the whole lines of an open file: what follows was torn by a kill, and would garble the next entry."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0
