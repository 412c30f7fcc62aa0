"""What the stacks of a rank say: which collective it waits in, and who called it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.+)')
_INSTALLED = re.compile(r"^.*/(?:site-packages|dist-packages|lib/python\d[\d.]*)/")
_OWN = re.compile(r"(?:.*/)?(megamem(?:_[a-z]+)?/.+)")
_LIBRARIES = ("torch/", "deepspeed/", "megatron/")
_C10D = "torch/distributed/distributed_c10d.py"
_STAGES = "megatron/core/pipeline_parallel/p2p_communication.py"
_LOCKS = ("threading.py", "concurrent/futures/_base.py", "queue.py")


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    @property
    def ours(self) -> bool:
        """Whether it is megamem's own."""
        return self.path.startswith("megamem")

    @property
    def path(self) -> str:
        """The file, from its package on where that is installed or megamem's own: ``megamem/train/trainer.py``."""
        installed = _INSTALLED.sub("", self.file)
        own = _OWN.fullmatch(installed) if installed == self.file else None
        return own[1] if own else installed

    @property
    def where(self) -> str:
        """``megamem/train/trainer.py:258 in _all_reduce``."""
        return f"{self.path}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class Thread:
    """Frames of one thread, the innermost first."""

    frames: tuple[Frame, ...]
    main: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is."""

    collective: str | None
    """The operation it waits for other ranks in, such as ``all_reduce``; None where it waits in none."""
    caller: str
    """The innermost frame of megamem (of any code but the libraries', where there is none), see :attr:`Frame.where`."""
    background: bool = False
    """Whether it is a background thread that waits there, and the main thread for that one."""


def parse_faulthandler(text: str) -> list[Thread]:
    """Threads of one dump as Python's faulthandler writes it: the newest first, so that the main thread is the last, unless there
    are more than it lists; then it is the one that took the signal."""
    stacks: list[tuple[list[Frame], bool]] = []
    complete = True
    for line in text.splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            stacks.append(([], line.startswith("Current")))
        elif stacks and (match := _FRAME.match(line)):
            stacks[-1][0].append(Frame(match["file"], int(match["line"]), match["function"]))
        elif line == "...":
            complete = False
    return [
        Thread(tuple(frames), main=index == len(stacks) - 1 if complete else current)
        for index, (frames, current) in enumerate(stacks)
    ]


def parse_py_spy(text: str) -> list[Thread]:
    """Threads as ``py-spy dump --json`` writes them; none where ``text`` is something else."""
    try:
        traces: list[dict[str, Any]] = json.loads(text)
        return [
            Thread(
                tuple(Frame(frame["filename"], int(frame["line"]), frame["name"]) for frame in trace["frames"]),
                trace["thread_name"] == "MainThread",
            )
            for trace in traces
        ]
    except (ValueError, TypeError, KeyError):
        return []


def place(threads: list[Thread]) -> Place | None:
    """Where the main thread is; where it waits for a background thread that is in a collective, where that one is. None without
    a main thread."""
    main = next((thread.frames for thread in threads if thread.main), ())
    if not main:
        return None
    collective = _collective(main)
    if collective is None and main[0].path in _LOCKS:
        for thread in threads:
            if not thread.main and (found := _collective(thread.frames)) is not None:
                return Place(found, _caller(thread.frames), background=True)
    return Place(collective, _caller(main))


def _collective(frames: tuple[Frame, ...]) -> str | None:
    """The function of megatron's exchange between stages that was called, or the innermost public one of torch.distributed."""
    if stages := [frame.function for frame in frames if frame.path == _STAGES]:
        return stages[-1]
    inside = [frame.function for frame in frames if frame.path == _C10D]
    return next((function for function in inside if not function.startswith("_")), inside[0] if inside else None)


def _caller(frames: tuple[Frame, ...]) -> str:
    own = next((frame for frame in frames if frame.ours), None)
    outside = next((frame for frame in frames if not frame.path.startswith(_LIBRARIES)), frames[0])
    return (own or outside).where
