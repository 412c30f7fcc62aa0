"""What somebody outside asks of a run that trains: a person by touching a file, its supervisor through another."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from megamem.train.control import Request
from megamem_launch.rundir import SAVE, STOP, check_lease, control_file, incarnation, read_json

_INTERVAL = 0.25  # seconds: a stat and an open on a network file system are no matter for every step


class Requests:
    """Looks for requests to the run in ``run_dir``. Used by one rank, which tells the others (:mod:`megamem.train.control`)."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._looked = 0.0
        own = incarnation()
        self._control = control_file(run_dir, own) if own else None
        self._saving = False
        self._saved: int | None = None  # SAVE, where it could not be removed, as it was when it was obeyed
        self.why = ""
        """Who asked last: ``STOP`` and ``SAVE`` for a person, else the supervisor's own words."""

    def poll(self) -> Request:
        """What is wanted now. A file system that does not answer wants nothing.

        Raises:
            LaunchError: another incarnation has taken the run over.
        """
        if time.monotonic() - self._looked < _INTERVAL:
            return Request.NONE
        self._looked = time.monotonic()
        with contextlib.suppress(OSError):
            check_lease(self._run_dir)
            if (self._run_dir / STOP).exists():
                self.why = STOP
                return Request.STOP
            asked = (read_json(self._control) if self._control else None) or {}
            if asked.get("request") == "stop":
                self.why = str(asked.get("why", "supervisor"))
                return Request.STOP
            made = self._save_made()
            if not self._saving and made is not None and made != self._saved:
                self._saving, self.why = True, SAVE
                return Request.SAVE
        return Request.NONE

    def saved(self) -> None:
        """Remove a person's request to save, which has been done."""
        if self._saving:
            self._saving = False
            with contextlib.suppress(OSError):
                self._saved = self._save_made()
                (self._run_dir / SAVE).unlink(missing_ok=True)

    def heed(self) -> None:
        """A person's wish that the run ends counts before whatever else it ends for."""
        with contextlib.suppress(OSError):
            if (self._run_dir / STOP).exists():
                self.why = STOP

    def obeyed(self, *, finished: bool) -> None:
        """Forget a person's requests, so that the next start trains: the run has saved and ends. A wish to stop that came too late
        to be told to anybody stays, unless there is nothing left to stop."""
        self._saving = True  # also one that nobody has looked at yet
        self.saved()
        if finished or self.why == STOP:
            with contextlib.suppress(OSError):
                (self._run_dir / STOP).unlink(missing_ok=True)

    def _save_made(self) -> int | None:
        try:
            return (self._run_dir / SAVE).stat().st_mtime_ns
        except FileNotFoundError:
            return None
