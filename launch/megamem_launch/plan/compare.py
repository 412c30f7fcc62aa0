"""``python -m megamem_launch.plan.compare``: the planner held against runs of many layouts on this machine.

Every layout trains some steps (:mod:`megamem_launch.plan.rank`), ranks started with torchrun's library. Compared are the most
resident memory that any rank ever had (``VmHWM``: interpreter, libraries and their shared pages included, nothing taken off) and
the median time of a step. The plan comes from the ceilings of ``--hardware``, or of a measurement made first.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamem.config import build
from megamem.errors import ConfigError
from megamem.files import write_text
from megamem_launch.config import load_config, read_yaml
from megamem_launch.plan.hardware import HardwareConfig
from megamem_launch.verbs.parse import parse

_TP, _PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
_SEQUENCE = "parallel.sequence_parallel=true"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "one rank, micro-batch 8": (1, ("train.micro_batch_size=8",)),
    "one rank, recompute": (1, ("train.recompute=full",)),
    "one rank, larger memories": (1, ("memory.bank.units=[64,32]", "memory.engram.rows_per_head=120000")),
    "dp 2": (2, ()),
    "dp 2, zero 0": (2, ("optimizer.zero_stage=0",)),
    "dp 2, zero 2": (2, ("optimizer.zero_stage=2",)),
    "dp 2, micro-batch 1": (2, ("train.micro_batch_size=1", "train.recompute=selective")),
    "tp 2": (2, (f"{_TP}=2", _SEQUENCE)),
    "pp 2": (2, (f"{_PP}=2",)),
    "ep 2": (2, ("parallel.expert_model_parallel_size=2",)),
    "cp 2": (2, ("parallel.context_parallel_size=2",)),
    "dp 4": (4, ()),
    "tp 2, pp 2": (4, (f"{_TP}=2", _SEQUENCE, f"{_PP}=2", "train.micro_batch_size=1")),
    "pp 2, dp 2": (4, (f"{_PP}=2", "train.micro_batch_size=1")),
    "tp 2, cp 2": (4, (f"{_TP}=2", _SEQUENCE, "parallel.context_parallel_size=2")),
}
"""Ranks and settings by the name in the picture."""

BASE: dict[str, Any] = {
    "base": "tiny",
    "name": "compare",
    "model": {
        "num_layers": 8,
        "hidden_size": 512,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "vocab_size": 8192,
        "moe": {
            "layers": [3, 7],
            "num_experts": 4,
            "router_topk": 2,
            "ffn_hidden_size": 512,
            "token_dispatcher": "alltoall",
        },
    },
    "memory": {
        "engram": {"layers": [1], "heads": 4, "width": 32, "rows_per_head": 40_000},
        "bank": {"layers": [2, 5], "units": [8, 4]},
    },
    "data": {"seq_length": 128},
    "train": {"steps": 7, "global_batch_size": 8, "micro_batch_size": 2, "eval_batches": 0},
    "checkpoint": {"interval": 0},
    "tracking": {"mlflow": False},
}


@dataclass
class Arguments:
    """Plan and run many layouts on this machine, and compare.

    Examples:
      python -m megamem_launch.plan.compare --data data/tiny --out docs/img
      python -m megamem_launch.plan.compare --data data/tiny --hardware hardware.yaml --only "dp 2" "tp 2"
    """

    data: str
    """Directory of prepared data with a vocabulary of at most 8192 entries and a tree of 2 levels with branching 4: that of
    `megamem data prepare configs/tiny.yaml`."""
    out: str = "."
    """Directory for plan_vs_measured.json and plan_vs_measured.svg."""
    hardware: str = ""
    """YAML file of `megamem profile --ceilings --out FILE`; empty to measure first."""
    only: tuple[str, ...] = ()
    """Names of layouts; all where none is given."""


def main(argv: list[str]) -> int:
    """Entry; exit code 1 where a layout misses its bar."""
    arguments = parse(Arguments, argv, "plan.compare")
    unknown = [name for name in arguments.only if name not in LAYOUTS]
    if unknown:
        raise ConfigError(f"--only names {unknown[0]!r}; set some of: {', '.join(LAYOUTS)}")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    hardware = _hardware(arguments.hardware)
    results = [compare(name, hardware, Path(arguments.data).resolve()) for name in arguments.only or LAYOUTS]
    write_text(out / "plan_vs_measured.json", json.dumps(results, indent=2) + "\n")
    draw(results, out / "plan_vs_measured.svg")
    for key, bar in (("peak_bytes", 0.1), ("step_seconds", 0.2)):
        worst = max(results, key=lambda result: abs(_error(result, key)))
        print(f"{key}: worst {_error(worst, key):+.1%} ({worst['layout']}), bar {bar:.0%}")
    return int(any(abs(_error(r, "peak_bytes")) > 0.1 or abs(_error(r, "step_seconds")) > 0.2 for r in results))


def compare(name: str, hardware: HardwareConfig, data: Path) -> dict[str, Any]:
    """Plan and run one of :data:`LAYOUTS`; peak of the fullest rank in bytes and seconds per step, planned and measured."""
    from megamem_launch.plan.reference import WARM_UP, plan_layout, run_layout, step_seconds

    ranks, overrides = LAYOUTS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(folder, data, overrides)
        found = run_layout(config, ranks, Path(folder))
    told, peak = plan_layout(config, hardware, ranks)
    assert told.time is not None
    steps = found[0]["phases"][WARM_UP:]
    result: dict[str, Any] = {
        "layout": name,
        "ranks": ranks,
        "settings": list(overrides),
        "planned": {
            "peak_bytes": peak["host"],
            "step_seconds": told.time.seconds,
            "parts": told.time.parts,
        },
        "measured": {
            "peak_bytes": max(rank["peak_bytes"] for rank in found),
            "started_bytes": max(rank["started_bytes"] for rank in found),
            "built_bytes": max(rank["built_bytes"] for rank in found),
            "step_seconds": step_seconds(found[0]),
            "phases": {phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in steps[-1]},
        },
    }
    print(
        f"{name}: peak {_error(result, 'peak_bytes'):+.1%} of {result['measured']['peak_bytes'] / 2**20:.0f} MiB, step "
        f"{_error(result, 'step_seconds'):+.1%} of {result['measured']['step_seconds']:.2f} s",
        flush=True,
    )
    return result


def build_config(folder: str, data: Path, overrides: tuple[str, ...]) -> Any:
    """The configuration of a layout, whose files are kept in ``folder``."""
    import yaml

    path = Path(folder) / "base.yaml"
    path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return load_config(path, [f"data.path={data}", f"runs_dir={folder}/runs", *overrides])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A scatter plot of planned over measured numbers, with the bars as bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = (
        ("peak_bytes", 2**30, "peak memory of the fullest rank (GiB)", 0.1),
        ("step_seconds", 1.0, "step (s)", 0.2),
    )
    for axes, (key, unit, label, bar) in zip(figure.subplots(1, 2), panels, strict=True):
        measured = [result["measured"][key] / unit for result in results]
        planned = [result["planned"][key] / unit for result in results]
        low, high = 0.9 * min(measured + planned), 1.1 * max(measured + planned)
        axes.fill_between(
            [low, high], [low * (1 - bar), high * (1 - bar)], [low * (1 + bar), high * (1 + bar)], alpha=0.15
        )
        axes.plot([low, high], [low, high], linewidth=0.8)
        for ranks, marker in ((1, "o"), (2, "s"), (4, "^")):
            chosen = [i for i, result in enumerate(results) if result["ranks"] == ranks]
            axes.scatter(
                [measured[i] for i in chosen], [planned[i] for i in chosen], marker=marker, s=28, label=f"{ranks} ranks"
            )
        axes.set(xlabel=f"measured {label}", ylabel="planned", xlim=(low, high), ylim=(low, high))
        axes.set_title(f"band: within {bar:.0%}", fontsize=9)
        axes.legend(fontsize=8)
    figure.savefig(path)


def _error(result: dict[str, Any], key: str) -> float:
    return float(result["planned"][key] / result["measured"][key] - 1)


def _hardware(path: str) -> HardwareConfig:
    if not path:
        from megamem_launch.plan.ceilings import measure

        return measure(4, Path.cwd())
    data = read_yaml(Path(path))
    return build(HardwareConfig, data.get("hardware", data), "hardware")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"plan.compare: {error}")
