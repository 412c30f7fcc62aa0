"""``torchrun -m megamem_launch.plan.rank FOLDER CONFIG [section.setting=value ...]``: one rank of a run that only takes steps.

What :mod:`megamem_launch.plan.compare` holds the planner against, and what :mod:`megamem_launch.plan.reference` learns from.
Each rank writes ``FOLDER/rank-<n>.json``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megamem.files import write_text
from megamem.observe.memory import peak_rss, rss
from megamem.parallel import groups as parallel_groups
from megamem_launch.accounting import account_memory
from megamem_launch.compose import build_parts, open_data
from megamem_launch.config import load_config
from megamem_launch.run import make_trainer
from megamem_launch.validate import validate


@dataclass(slots=True)
class _Steps:
    """An observer that keeps the time of every step and its phases, and the journal's other numbers of the last one."""

    seconds: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    phases: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.seconds.append(metrics["step_seconds"])
        self.metrics = metrics
        self.phases.append({n.partition("/")[2]: value for n, value in metrics.items() if n.startswith("seconds/")})
        self.peak = peak_rss()

    def evaluation(self, step: int, loss: float, *, blocked: bool) -> None: ...

    def event(self, name: str, step: int, text: str) -> None: ...


def main(argv: list[str]) -> int:
    """Train ``train.steps`` steps without saving or evaluating, and write what they took."""
    folder, source, *overrides = argv
    config = load_config(source, overrides)
    config.train.eval_batches = 0
    data = open_data(config, verify=False)
    observer = _Steps()
    parallel_groups.init_distributed()
    try:
        layout = validate(config, dist.get_world_size())
        groups = parallel_groups.initialize(layout, seed=config.train.seed)
        started = rss()
        with contextlib.closing(build_parts(config, data, groups)) as parts:
            built = peak_rss()
            account = account_memory(parts)
            trainer = make_trainer(parts, observer, lambda step: None)
            trainer.run()
            seconds = observer.seconds
            record = {
                "seconds": seconds,
                "started_bytes": started,
                "built_bytes": built,
                "peak_bytes": observer.peak,
                "reserved_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
                "account": account,
                "metrics": {name: value for name, value in observer.metrics.items() if isinstance(value, int | float)},
                "phases": observer.phases,
            }
            write_text(Path(folder) / f"rank-{groups.coordinates.rank}.json", json.dumps(record))
    finally:
        parallel_groups.destroy()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
