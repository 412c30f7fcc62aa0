"""The processes of one incarnation, as its supervisor sees them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import psutil

from megamem.errors import LaunchError
from megamem_launch.slurm.client import run
from megamem_launch.supervise.signals import unblock
from megamem_launch.supervise.ties import die_with_parent

_PATIENCE = 15.0  # seconds that killed processes get to be gone


class Step(Protocol):
    """All ranks of an incarnation."""

    def poll(self) -> int | None:
        """Exit code once every rank has ended: 0 where all ended with 0."""
        ...

    def ask_for_stacks(self) -> None:
        """Send SIGUSR2 to every rank."""
        ...

    def kill(self) -> None:
        """Kill every rank, stopped ones too; returns when they are gone, or cannot be waited for any longer."""
        ...


class LocalStep:
    """An agent and its ranks on this machine, which end with this process."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._agent = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the terminal is for the supervisor
            preexec_fn=_of_its_own,
        )

    def poll(self) -> int | None:
        return self._agent.poll()

    def ask_for_stacks(self) -> None:
        for rank in self._ranks():
            rank.send_signal(signal.SIGUSR2)

    def kill(self) -> None:
        ranks = self._ranks()
        self._agent.kill()
        self._agent.wait()
        for rank in ranks:
            rank.kill()
        psutil.wait_procs(ranks, timeout=_PATIENCE)

    def _ranks(self) -> list[psutil.Process]:
        try:
            children = psutil.Process(self._agent.pid).children()
            return [child for child in children if "megamem_launch.supervise.rank" in child.cmdline()]
        except psutil.NoSuchProcess:
            return []


class SrunStep:
    """A step of SLURM; ``name`` is what SLURM calls it and must be that of no other step of the job."""

    def __init__(self, job: str, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        self._job, self._name = job, name
        self._srun = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=unblock
        )

    def poll(self) -> int | None:
        return self._srun.poll()

    def ask_for_stacks(self) -> None:
        self._signal("USR2")

    def kill(self) -> None:
        self._signal("KILL")
        if not wait(self._srun, _PATIENCE):  # srun waits for nodes that are lost, which its own end does not change
            self._srun.kill()
            self._srun.wait()

    def _signal(self, name: str) -> None:
        with contextlib.suppress(LaunchError):  # the step is gone, or SLURM does not answer; srun's end tells the rest
            listed = run("squeue", "--noheader", "--steps", f"--jobs={self._job}", "--format=%i %j")
            for step, _, called in (line.strip().partition(" ") for line in listed.splitlines()):
                if called == self._name:
                    run("scancel", "--quiet", f"--signal={name}", step)


def _of_its_own() -> None:
    unblock()
    die_with_parent()


def wait(process: subprocess.Popen[bytes], seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
    """Whether ``process`` ended within ``seconds`` and before ``until`` held."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline or until():
            return False
        time.sleep(0.05)
    return True
