"""``megamem profile --overhead``: what marks of phases and counts of bytes cost.

Every rank trains with both on and both off by turns, in one process, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamem.observe.phases import Phases, phases
from megamem.observe.profiler import StepProfiler, Windows
from megamem.observe.wire import WireCounter
from megamem.parallel import groups as parallel_groups
from megamem_launch.compose import build_parts, open_data
from megamem_launch.config import RunConfig
from megamem_launch.profile.options import scratch_config
from megamem_launch.profile.run import Recorder
from megamem_launch.run import make_trainer
from megamem_launch.validate import validate

BLOCK = 5
"""Steps with marks and counts, then as many without."""
BLOCKS = 24
WARMUP = 5


class Turns:
    """Switches marks and counts on and off, and keeps the seconds of every step by which they were."""

    def __init__(self, marks: Phases, counter: WireCounter) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._marks, self._counter = marks, counter
        self._open = contextlib.ExitStack()
        self._step, self._began, self._on = 0, 0.0, False

    def after_step(self) -> None:
        """The first step of a block is not kept: switching is no step's."""
        now = time.perf_counter()
        place = (self._step - WARMUP) % BLOCK
        if self._step >= WARMUP and place:
            self.seconds[self._on].append(now - self._began)
        self._step += 1
        if self._step >= WARMUP and (self._step - WARMUP) % BLOCK == 0:
            self._switch(not self._on)
        self._began = time.perf_counter()

    def close(self) -> None:
        """Leave things as they were."""
        self._open.close()

    def _switch(self, on: bool) -> None:
        self._open.close()
        self._on = on
        if on:
            self._open.enter_context(self._counter.counting())
            return
        silent: dict[str, Any] = {"enter": lambda name: None, "leave": lambda: None}
        vars(self._marks).update(silent)  # in front of the methods of the class
        self._open.callback(lambda: [vars(self._marks).pop(name) for name in silent])


def compare(config: RunConfig, folder: Path) -> dict[bool, list[float]]:
    """Seconds of steps with (True) and without marks and counts."""
    config = scratch_config(config, folder, WARMUP + BLOCK * BLOCKS)
    layout = validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    data = open_data(config)
    parallel_groups.init_distributed()
    try:
        groups = parallel_groups.initialize(layout, seed=config.train.seed)
        with contextlib.closing(build_parts(config, data, groups)) as parts:
            counter = WireCounter(parallel_groups.wires(groups, parts.memory.links.groups))
            idle = StepProfiler(
                Windows(1, 1, 0),
                marks=phases,
                counter=counter,
                device=groups.device,
                out=folder,
                rank=groups.world.rank(),
            )
            turns = Turns(phases, counter)
            make_trainer(parts, Recorder(idle), lambda step: None, after_step=turns.after_step).run()
            turns.close()
            return turns.seconds
    finally:
        parallel_groups.destroy()
        dist.destroy_process_group()


def measure_overhead(config: RunConfig) -> int:
    """Print the comparison on rank 0."""
    folder = Path(tempfile.mkdtemp(prefix="megamem-overhead-"))
    try:
        seconds = compare(config, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if os.environ.get("RANK", "0") == "0":
        for name, of in (("least", min), ("median", statistics.median)):
            on, off = of(seconds[True]), of(seconds[False])
            print(f"{name:7} on {on * 1e3:.3f} ms, off {off * 1e3:.3f} ms, overhead {on / off - 1:+.2%}")
    return 0
