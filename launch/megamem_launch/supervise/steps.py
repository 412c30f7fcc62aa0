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
from megamem_launch.watch.beats import Beat
from megamem_launch.watch.process import state_in

_PATIENCE = 15.0  # seconds that killed processes get to be gone, and nodes to say how processes are
_NODES_ASKED = 16
_END = "end"


class Step(Protocol):
    """All ranks of an incarnation."""

    def poll(self) -> int | None:
        """Exit code once every rank has ended: 0 where all ended with 0."""
        ...

    def ask_for_stacks(self) -> None:
        """Send SIGUSR2 to every rank."""
        ...

    def states(self, beats: Sequence[Beat]) -> dict[int, str]:
        """How the processes of ranks on other machines are, as far as these say it: a letter of ``/proc/PID/stat``, or ``gone``."""
        ...

    def kill(self) -> bool:
        """Kill every rank, stopped ones too, and wait until they are gone; False where some still are not after a while."""
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
            with contextlib.suppress(psutil.Error):
                rank.send_signal(signal.SIGUSR2)

    def states(self, beats: Sequence[Beat]) -> dict[int, str]:
        return {}

    def kill(self) -> bool:
        ranks = self._ranks()
        self._agent.kill()
        self._agent.wait()
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.kill()
        return not psutil.wait_procs(ranks, timeout=_PATIENCE)[1]

    def _ranks(self) -> list[psutil.Process]:
        ranks = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._agent.pid).children():
                with contextlib.suppress(psutil.Error):  # it may just have ended
                    if "megamem_launch.supervise.rank" in child.cmdline():
                        ranks.append(child)
        return ranks


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

    def states(self, beats: Sequence[Beat]) -> dict[int, str]:
        nodes: dict[str, list[Beat]] = {}
        for beat in beats:
            nodes.setdefault(beat.host, []).append(beat)
        asked = {node: _read_stats(node, nodes[node]) for node in sorted(nodes)[:_NODES_ASKED]}
        found: dict[int, str] = {}
        deadline = time.monotonic() + _PATIENCE
        for node, srun in asked.items():
            try:
                lines = srun.communicate(timeout=max(0.0, deadline - time.monotonic()))[0].decode().splitlines()
            except subprocess.TimeoutExpired:
                srun.kill()
                srun.communicate()
                continue
            if _END in lines:
                stats = {line.partition(" ")[0]: line for line in lines}
                found |= {beat.rank: state_in(stats.get(str(beat.pid), ""), beat) for beat in nodes[node]}
        return found

    def kill(self) -> bool:
        self._signal("KILL")
        if wait(self._srun, _PATIENCE):
            return True
        self._srun.kill()  # srun waits for nodes that are lost, which its own end does not change
        self._srun.wait()
        return not self._listed()

    def _signal(self, name: str) -> None:
        for step in self._listed():
            with contextlib.suppress(LaunchError):  # it has ended, or SLURM does not answer; srun's end tells the rest
                run("scancel", "--quiet", f"--signal={name}", step)

    def _listed(self) -> list[str]:
        """The step's id, where SLURM says that it is still there."""
        try:
            listed = run("squeue", "--noheader", "--steps", f"--jobs={self._job}", "--format=%i %j")
        except LaunchError:
            return []
        steps = (line.strip().partition(" ") for line in listed.splitlines())
        return [step for step, _, called in steps if called == self._name]


def _read_stats(node: str, beats: Sequence[Beat]) -> subprocess.Popen[bytes]:
    """Print a line of each of these processes, as the kernel of their node knows it, and :data:`_END`."""
    step = ["srun", "--overlap", "--mpi=none", "--quiet", "--job-name=states", "--nodes=1", "--ntasks=1"]
    files = " ".join(f"/proc/{beat.pid}/stat" for beat in beats)
    return subprocess.Popen(
        [*step, "--cpus-per-task=1", f"--nodelist={node}", "sh", "-c", f"cat {files}; echo {_END}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=unblock,
    )


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
