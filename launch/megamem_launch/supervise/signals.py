"""Signals of the batch step, kept for the loop that asks for them."""

from __future__ import annotations

import signal

LAST_WARNING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals after which the job is killed, or a person wants it to end."""


class Signals:
    """Holds back the signals in ``names`` (such as ``USR1``) besides :data:`LAST_WARNING`, until :meth:`take` asks for them.

    They are blocked, so none ends this process or comes at a bad time. Processes that it starts inherit that: SLURM's commands
    speak to the controller to the end while SLURM sends SIGTERM to all of a job. Others are started with :func:`unblock`. Use it
    before any thread is started. A hang-up or interrupt that is ignored, as under nohup, stays ignored.
    """

    def __init__(self, *names: str) -> None:
        ignored = {number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) is signal.SIG_IGN}
        self._held = {*LAST_WARNING, *(signal.Signals[f"SIG{name}"] for name in names)} - ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, self._held)

    def take(self) -> list[signal.Signals]:
        """The signals that arrived since the last call, each once."""
        taken = []
        while (received := signal.sigtimedwait(self._held, 0)) is not None:
            taken.append(signal.Signals(received.si_signo))
        return taken


def unblock() -> None:
    """For ``preexec_fn``: a child that gets signals like any other process."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
