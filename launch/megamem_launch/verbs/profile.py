"""``megamem profile``: check the configuration, then profile here or through torchrun, or sweep over layouts."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megamem.errors import ConfigError
from megamem_launch.config import RunConfig, load_config
from megamem_launch.profile.options import UNDER_NSYS, Options
from megamem_launch.torchrun import run_ranks
from megamem_launch.validate import validate
from megamem_launch.verbs.parse import flags_last, parse


@dataclass
class Arguments:
    """Measure how fast a configuration trains here, and where time, bytes and memory go.

    Three windows of optimizer steps: warm-up, measured, traced. RUNS_DIR/NAME/profile gets profile.json, profile.html (one page
    that needs no network) and a trace of every rank; MLflow gets the numbers. A run of this name is neither read nor changed.
    With parallel.nproc above 1 the ranks are started with torchrun on this machine; under torchrun or SLURM start
    `torchrun -m megamem_launch.profile CONFIG` instead.

    Examples:
      megamem profile configs/tiny.yaml
      megamem profile configs/tiny.yaml parallel.pipeline_model_parallel_size=2 --nproc 2 --peak-tflops 0.1
      megamem profile configs/tiny.yaml --nproc 2 --sweep "parallel.tensor_model_parallel_size=1,2;train.micro_batch_size=1,2"
      megamem profile --ceilings --out ceilings.yaml        what this machine can do, for `megamem plan`
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = ""
    """YAML file, or the directory of a run."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETTING=VALUE")] = ()
    """Settings to change, as section.setting=value (the value is read as YAML)."""
    warmup: int = 3
    """Steps before anything is measured."""
    steps: int = 10
    """Steps that are measured."""
    traced: int = 2
    """Steps that are traced, after those; 0 for no trace and no memory by kind."""
    nproc: int = 0
    """Ranks to start on this machine; 0 takes parallel.nproc."""
    peak_tflops: float = 0.0
    """TFLOP/s that one device can do at most, for MFU; 0 takes it from --cluster. Without either there are FLOP/s and no MFU."""
    cluster: str = ""
    """Description of the cluster, whose hardware section states the peak."""
    sweep: str = ""
    """Settings with several values, `SETTING=V1,V2;SETTING=...`, or a YAML file with grid and points: profiles each
    combination in processes of its own, and compares them."""
    checkpoint: bool = False
    """Time one checkpoint too; it is written below --out and removed."""
    nsys: bool = False
    """Run under NVIDIA Nsight Systems, which records the traced window in place of torch.profiler."""
    overhead: bool = False
    """In place of a profile, print what its marks and counts cost: steps with and without them, by turns."""
    out: str = ""
    """Directory for the results; empty for RUNS_DIR/NAME/profile."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    if "--ceilings" in argv:
        from megamem_launch.plan.ceilings import main as measure_ceilings

        return measure_ceilings([argument for argument in argv if argument != "--ceilings"])
    arguments = parse(Arguments, flags_last(Arguments, argv), "profile")
    if not arguments.config:
        raise ConfigError("no configuration is given; name a YAML file or the directory of a run (see --help)")
    if arguments.sweep and (arguments.nsys or arguments.overhead):
        flag = "--nsys" if arguments.nsys else "--overhead"
        raise ConfigError(f"{flag} looks at one configuration and --sweep names several; leave one of the two out")
    overrides = [*arguments.overrides, *([f"parallel.nproc={arguments.nproc}"] if arguments.nproc else [])]
    config = load_config(arguments.config, overrides)
    # What the profiler says of itself; torch reads this when it is imported, here and in the ranks.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    options = _options(arguments, config)
    if arguments.sweep:
        from megamem_launch.profile.sweep import run_sweep

        return run_sweep(config, options, arguments.sweep, arguments.config, overrides)
    if "WORLD_SIZE" not in os.environ:
        if options.nsys and UNDER_NSYS not in os.environ:
            from megamem_launch.profile.nsys import under_nsys

            return under_nsys(options.out, ["-m", "megamem.cli", "profile", *argv])
        if config.parallel.nproc > 1:
            return _torchrun(config, argv)
    if arguments.overhead:
        from megamem_launch.profile.overhead import measure_overhead

        return measure_overhead(config)
    from megamem_launch.profile.run import profile_rank

    profile = profile_rank(config, options)
    if profile is not None:
        from megamem_launch.profile.publish import publish

        publish(profile, config, options.out)
    return 0


def _options(arguments: Arguments, config: RunConfig) -> Options:
    peak, source, cluster = arguments.peak_tflops, "--peak-tflops", ""
    if arguments.cluster and not peak:
        from megamem_launch.cluster import load_cluster

        hardware = load_cluster(arguments.cluster).hardware
        if arguments.sweep:
            cluster = arguments.cluster  # points may differ in their precision
        else:
            precision = config.train.precision
            if precision == "auto":
                precision = "bf16" if hardware.on_gpu else "fp32"
            peak, source = hardware.peak_tflops(precision), f"{arguments.cluster}, {precision}"
            if not peak:
                raise ConfigError(
                    f"{arguments.cluster} has no hardware.peak_tflops_{precision}, which --cluster takes the peak from; set it, or "
                    "give --peak-tflops, or leave both out for FLOP/s without MFU"
                )
    return Options(
        out=Path(arguments.out) if arguments.out else config.run_dir / "profile",
        warmup=arguments.warmup,
        steps=arguments.steps,
        traced=arguments.traced,
        peak_tflops=peak,
        peak_source=source if peak else "",
        cluster=cluster,
        checkpoint=arguments.checkpoint,
        nsys=arguments.nsys,
    )


def _torchrun(config: RunConfig, argv: list[str]) -> int:
    validate(config, config.parallel.nproc)
    failure = run_ranks(config.parallel.nproc, "megamem_launch.profile", argv)
    if failure is None:
        return 0
    if failure.text:
        print(f"megamem profile: {failure.text}", file=sys.stderr)
    return failure.code
