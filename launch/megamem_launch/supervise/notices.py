"""Notices that an incarnation is to end: signals to the supervisor or to its ranks, what they mean, and telling the ranks."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable

from megamem_launch import rundir
from megamem_launch.slurm.parse import Job
from megamem_launch.supervise.allocation import Allocation, SlurmAllocation
from megamem_launch.supervise.incarnation import Incarnation
from megamem_launch.supervise.rank import TERMINATE
from megamem_launch.supervise.request import Request, request_of
from megamem_launch.supervise.signals import Signals
from megamem_launch.supervise.submission import Submission


class Notices:
    """Listens from when it is made; ``say`` tells people what arrived."""

    def __init__(self, submission: Submission, allocation: Allocation, say: Callable[[str], None]) -> None:
        self._submission, self._allocation, self._say = submission, allocation, say
        self._signals = Signals(submission.cluster.slurm.signal)
        self._untold = ""
        self.request: Request | None = None
        """What was asked for, the last word if it was asked more than once."""
        self.count = 0
        """Of what changed how much time there is: the request, and later signals that leave less."""

    def tell(self, incarnation: Incarnation, why: str = "") -> None:
        """Have the ranks save and stop for the reason ``why``. Where the file system refuses, the next call does it."""
        self._untold = why or self._untold
        if self._untold:
            path = rundir.control_file(self._submission.run_dir, str(incarnation))
            with contextlib.suppress(OSError):
                rundir.write_json(path, {"request": "stop", "why": self._untold})
                self._untold = ""

    def look(self, incarnation: Incarnation | None = None) -> bool:
        """Whether somebody wants the ranks to stop: by a signal to this process, or to the ranks of ``incarnation``."""
        received: list[signal.Signals | None] = [*self._signals.take()]
        if incarnation is not None and self.request is None:
            with contextlib.suppress(OSError):
                markers = list(rundir.live_dir(self._submission.run_dir, str(incarnation)).glob(f"{TERMINATE}*"))
                received += [None] if markers else []
                for marker in markers:
                    marker.unlink(missing_ok=True)
        for number in received:
            again = self.request is not None
            local = not isinstance(self._allocation, SlurmAllocation)
            job = None if local else self._job_behind(number, incarnation)
            request = request_of(number, job, self._submission, local=local, again=again, ends=self._allocation.ends)
            if request is not None:
                self.request = request
                self._say(f"{number.name if number else 'SIGTERM to the ranks'}: {request.why}")
            elif again and job is not None and job.state != "RUNNING":
                self._say(f"{number.name if number else 'SIGTERM to the ranks'}: SLURM calls the job {job.state}")
            else:
                continue
            self.count += 1
        return self.request is not None

    def _job_behind(self, number: signal.Signals | None, incarnation: Incarnation | None) -> Job | None:
        """The job that ``number`` came to. Where SLURM is slow to say the ranks begin to save meanwhile: there is little time."""
        if number is not None and incarnation is not None and self.request is None:
            if (job := self._allocation.job(patient=False)) is not None:
                return job
            self.tell(incarnation, number.name)
        return self._allocation.job()
