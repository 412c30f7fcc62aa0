"""What somebody outside asks of a run that trains: a person by touching a file, its supervisor through another."""

from __future__ import annotations

import time
from pathlib import Path

from megamem.train.control import Request
from megamem_launch.rundir import check_lease, control_file, incarnation, read_json

STOP, SAVE = "STOP", "SAVE"
"""Files in the directory of a run that a person makes: save and end; save and go on."""
_INTERVAL = 0.25  # seconds: a stat and an open on a network file system are no matter for every step


class Requests:
    """Looks for requests to the run in ``run_dir``. Used by one rank, which tells the others (:mod:`megamem.train.control`)."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._looked = 0.0
        own = incarnation()
        self._control = control_file(run_dir, own) if own else None
        self.why = ""
        """Who asked last: ``STOP`` and ``SAVE`` for a person, else the supervisor's own words."""

    def poll(self) -> Request:
        """What is wanted now.

        Raises:
            LaunchError: another incarnation has taken the run over.
        """
        if time.monotonic() - self._looked < _INTERVAL:
            return Request.NONE
        self._looked = time.monotonic()
        check_lease(self._run_dir)
        if (self._run_dir / STOP).exists():
            self.why = STOP
            return Request.STOP
        asked = (read_json(self._control) if self._control else None) or {}
        if asked.get("request") == "stop":
            self.why = str(asked.get("why", "supervisor"))
            return Request.STOP
        if (self._run_dir / SAVE).exists():
            (self._run_dir / SAVE).unlink(missing_ok=True)
            self.why = SAVE
            return Request.SAVE
        return Request.NONE

    def obeyed(self) -> None:
        """Forget a person's request to stop, so that the next start trains."""
        (self._run_dir / STOP).unlink(missing_ok=True)
