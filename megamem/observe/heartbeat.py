"""Signs of life of a rank: what it is doing, once a second, and its stacks when asked. Needs only the standard library.

The record is rewritten in place, in one write of a fixed size, by opening and closing the file each time: closing is what brings
it to a network file system, and no directory is touched, whose server would have to serve all ranks. A reader may meet a write
half done: ``beat``, the first key, then differs from ``end``, the last.

A rank that waits in a collective goes on writing, with the same ``sequence``. One that is stopped, or whose interpreter is stuck
in native code that keeps the lock, does not write at all.

Fields of a record: ``rank host pid start_tick incarnation`` say who writes; ``time`` is the writer's clock [s since 1970]; ``step``
is under way, 0 before training; ``phase`` and ``sequence`` are of :mod:`megamem.observe.phases`, the phase ``ended`` after a clean
end; ``idle_seconds`` have passed since ``sequence`` changed; ``seconds`` by phase were spent in the steps after ``first_step``, the
first that was seen under way, so that neither compilation nor warm-up counts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Protocol

from megamem.files import write_text

SECONDS = 1.0
"""Between two beats."""
_RECORD = 2048  # bytes, and a multiple of it where a record needs more


class Marks(Protocol):
    """What a heartbeat reads of :class:`megamem.observe.phases.Phases`."""

    step: int
    sequence: int

    @property
    def current(self) -> str:
        """The innermost phase."""
        ...

    def totals(self) -> dict[str, float]:
        """Seconds in every phase so far."""
        ...


class Heartbeat:
    """Writes one JSON record to ``path`` every ``seconds``, from a thread that ends with the process.

    ``dump`` is the file that the rank's stacks go to: it is flushed when it has grown, since a signal handler cannot.
    A file system that refuses a beat is no reason for training to end: the next beat tries again, and the first failure is told
    on standard error.
    """

    def __init__(
        self, path: Path, rank: int, marks: Marks, *, dump: IO[bytes] | None = None, seconds: float = SECONDS
    ) -> None:
        self._path, self._marks, self._dump, self._seconds = path, marks, dump, seconds
        self._who = {
            "rank": rank,
            "host": node_name(),
            "pid": os.getpid(),
            "start_tick": start_tick(os.getpid()),
            "incarnation": os.environ.get("MEGAMEM_INCARNATION", ""),
        }
        self._beat = self._size = self._dumped = 0
        self._sequence, self._since = marks.sequence, time.monotonic()
        self._first_step = 0
        self._before: dict[str, float] = {}
        self._told = False
        self._stop = threading.Event()
        write_text(path, self._record().decode())  # a reader never sees a file without a record
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write a last record, with the phase ``ended``, and end the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._seconds)
            try:
                self._write(self._record())
                self._flush_dump()
            except OSError as error:
                if not self._told:
                    self._told = True
                    print(f"the heartbeat {self._path} could not be written: {error}", file=sys.stderr, flush=True)

    def _record(self) -> bytes:
        sequence, now = self._marks.sequence, time.monotonic()
        if sequence != self._sequence:
            self._sequence, self._since = sequence, now
        step, totals = self._marks.step, self._marks.totals()
        if not self._first_step:
            self._first_step, self._before = step, totals
        self._beat += 1
        record = {
            "beat": self._beat,
            **self._who,
            "time": round(time.time(), 3),
            "step": step,
            "first_step": self._first_step,
            "phase": "ended" if self._stop.is_set() else self._marks.current,
            "sequence": sequence,
            "idle_seconds": round(now - self._since, 3),
            "seconds": {name: round(value - self._before.get(name, 0.0), 4) for name, value in totals.items()},
            "end": self._beat,
        }
        text = json.dumps(record).encode()
        self._size = max(self._size, -(-(len(text) + 1) // _RECORD) * _RECORD)
        return text.ljust(self._size - 1) + b"\n"

    def _write(self, record: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, record, 0)
        finally:
            os.close(descriptor)

    def _flush_dump(self) -> None:
        if self._dump is not None and (size := os.fstat(self._dump.fileno()).st_size) != self._dumped:
            self._dumped = size
            os.fsync(self._dump.fileno())


def register_dump(path: Path) -> IO[bytes]:
    """From now on SIGUSR2 appends the stacks of all threads to ``path``; keep the file that is returned open.

    The handler is faulthandler's: it runs within the signal, so that an interpreter that is stuck in native code answers too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab", buffering=0)
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    return file


def start_heartbeat(live: Path, dumps: Path, rank: int, *, seconds: float = SECONDS) -> Heartbeat:
    """Heartbeat of this process in ``live`` and its stacks, when asked for, in ``dumps``; both directories are made."""
    from megamem.observe.phases import phases

    live.mkdir(parents=True, exist_ok=True)
    dump = register_dump(dumps / f"rank-{rank:05d}.txt")
    return Heartbeat(live / f"rank-{rank:05d}.json", rank, phases, dump=dump, seconds=seconds)


def node_name() -> str:
    """What SLURM calls this node; the name of the host elsewhere."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def start_tick(pid: int) -> int:
    """When a process of this machine began, in clock ticks since boot: with the pid it names one process for ever. 0 where
    that cannot be told."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # The name of the command may hold blanks and brackets; the 22nd field is the 20th after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return 0
