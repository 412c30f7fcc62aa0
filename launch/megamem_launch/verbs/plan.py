"""``megamem plan``: what a configuration takes on a cluster, before a job is submitted."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from megamem.errors import ConfigError
from megamem_launch.config import RunConfig, load_config
from megamem_launch.verbs.parse import flags_last, parse

if TYPE_CHECKING:
    from megamem_launch.cluster import Cluster
    from megamem_launch.plan.search import Plan, Planner


@dataclass
class Arguments:
    """Tell what a configuration takes on a cluster: memory of a rank by kind, bytes on every wire, time of a step; and which
    layouts would be faster.

    A layout that does not fit ends with exit code 2 and the number that is too large, after the recommendations. Without
    --cluster it is this machine with parallel.nproc ranks. Time is estimated from the ceilings in the cluster file, which
    `megamem profile --ceilings` measures.

    Examples:
      megamem plan configs/engram_27b.yaml nodes=8 --cluster configs/clusters/slurm_8xh100.yaml
      megamem plan configs/quickstart.yaml
      megamem plan configs/engram_27b.yaml --cluster cluster.yaml --top 0 --json
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = ""
    """YAML file, or the directory of a run."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETTING=VALUE")] = ()
    """Settings to change: of the run as section.setting=value, of the cluster as nodes=8 or hardware.disk_gib=800."""
    cluster: str = ""
    """YAML file of a cluster, such as those in configs/clusters."""
    top: int = 5
    """Layouts to recommend; 0 looks for none."""
    json: bool = False
    """Print everything as JSON."""


_CLUSTER = ("nodes", "gpus_per_node", "ranks_per_node", "cpus_per_node", "hardware", "slurm")


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, flags_last(Arguments, argv), "plan")
    if not arguments.config:
        raise ConfigError("no configuration is given; name a YAML file or the directory of a run (see --help)")
    if arguments.top < 0:
        raise ConfigError(f"--top is {arguments.top}; set 0 or more")
    ours = [text for text in arguments.overrides if text.partition("=")[0].split(".")[0] not in _CLUSTER]
    theirs = [text for text in arguments.overrides if text not in ours]
    config = load_config(arguments.config, ours)
    cluster = _cluster(arguments.cluster, theirs, config)
    cores = 0 if arguments.cluster else len(os.sched_getaffinity(0))
    _fill_vocabulary(config)
    from megamem_launch.plan.search import Planner
    from megamem_launch.validate import validate

    planner = Planner(config, cluster, cores=cores)
    own: Plan | None = None
    try:
        layout = validate(config, cluster.world_size)
    except ConfigError as error:
        where = f"nodes={cluster.nodes} x ranks_per_node={cluster.ranks_per_node} of cluster {cluster.name}: "
        illegal = f"{where if arguments.cluster else ''}{error}"
        refusals = [illegal]
    else:
        illegal = ""
        own = planner.plan(config, layout)
        refusals = own.refusals
    ranked, seen = planner.best(arguments.top) if arguments.top else ([], 0)
    if arguments.json:
        print(json.dumps(_plain(own, ranked, refusals, cluster), indent=2))
    else:
        _print(own, ranked, seen, cluster)
    if illegal:
        raise ConfigError(illegal)
    if refusals:
        advice = f"set {' '.join(ranked[0].settings)}" if ranked else _more(planner, config, bool(arguments.cluster))
        raise ConfigError(f"{arguments.config} does not fit {cluster.name}: {'; '.join(refusals)}; {advice}")
    return 0


def _cluster(path: str, overrides: list[str], config: RunConfig) -> Cluster:
    from megamem_launch.cluster import load_cluster

    if path:
        return load_cluster(path, overrides)
    if overrides:
        raise ConfigError(f"{overrides[0]} is a setting of a cluster; name its file with --cluster")
    from megamem_launch.plan.machine import local_cluster

    return local_cluster(config.parallel.nproc, Path(config.memory.disk.path or config.runs_dir))


def _fill_vocabulary(config: RunConfig) -> None:
    """From prepared data, where there is any; else the tokenizer that is to be trained."""
    if config.model.vocab_size:
        return
    description = Path(config.data.path) / "data.json"
    if config.data.path and description.is_file():
        from megamem_data.prepared import PreparedData

        config.model.vocab_size = PreparedData.open(Path(config.data.path), verify=False).vocab_size
    elif not config.data.tokenizer.model:
        config.model.vocab_size = config.data.tokenizer.vocab_size


def _more(planner: Planner, config: RunConfig, on_cluster: bool) -> str:
    """What helps where no layout that was looked at fits."""
    if not on_cluster:
        return "use a smaller model or memory"
    nodes = planner.nodes_that_fit(config)
    return f"this layout fits nodes={nodes}" if nodes else "use more nodes, or a smaller model or memory"


def _notes(own: Plan, cluster: Cluster) -> list[str]:
    """What the memory of a plan leaves out."""
    hardware, notes = cluster.hardware, []
    if not hardware.ceilings.process_mib:
        notes.append(
            "the process itself (interpreter, libraries) and what the heap wastes are not in it, as the hardware has no ceilings"
        )
    for place, limit in (("host", hardware.host_memory_gib), ("disk", hardware.disk_gib)):
        if own.peak(place) and not limit:
            name = "hardware.disk_gib" if place == "disk" else "hardware.host_memory_gib"
            what = "disk space" if place == "disk" else "host memory"
            notes.append(f"{what} was not checked against anything, as {name} is 0")
    return notes


def _plain(own: Plan | None, ranked: list[Plan], refusals: list[str], cluster: Cluster) -> dict[str, Any]:
    def of(one: Plan) -> dict[str, Any]:
        return {
            "settings": one.settings,
            "layout": asdict(one.layout),
            "fits": one.fits,
            "refusals": one.refusals,
            "ranks": [asdict(rank) for rank in one.ranks],
            "traffic": one.traffic,
            "seconds": one.time.parts if one.time else None,
            "step_seconds": one.time.seconds if one.time else None,
            "tokens_per_second": one.tokens_per_second or None,
            "flops_per_token": one.flops_per_token,
        }

    return {
        "cluster": cluster.name,
        "ceilings": cluster.hardware.ceilings.source or None,
        "plan": of(own) if own is not None else None,
        "notes": _notes(own, cluster) if own is not None else [],
        "refusals": refusals,
        "recommended": [of(one) for one in ranked],
    }


def _print(own: Plan | None, ranked: list[Plan], seen: int, cluster: Cluster) -> None:
    from rich.console import Console

    console = Console(width=max(100, shutil.get_terminal_size((120, 24)).columns))
    if own is not None:
        _print_memory(console, own)
        for note in _notes(own, cluster):
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        _print_step(console, own, cluster)
    if ranked:
        _print_ranked(console, ranked, seen, cluster)
    elif seen:
        console.print(f"\nnone of {seen} layouts fits {cluster.name}")


def _print_memory(console: Any, own: Plan) -> None:
    from rich.table import Table

    from megamem.observe.accounting import PLACES
    from megamem.observe.progress import format_bytes

    layout = own.layout
    sizes = f"tp {layout.tp}, pp {layout.pp}, cp {layout.cp}, ep {layout.ep}, dp {layout.dp}"
    console.print(f"memory of a rank: {sizes}", highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("where")
    stages = own.ranks if len(own.ranks) <= 4 else [own.ranks[0], own.ranks[len(own.ranks) // 2], own.ranks[-1]]
    for rank in stages:
        table.add_column(f"stage {layout.coordinates(rank.rank).pp}", justify="right")
    for key in dict.fromkeys(key for rank in stages for key in rank.held):
        part, _, place = key.rpartition("_")
        table.add_row(part, place, *(format_bytes(rank.held.get(key, 0)) for rank in stages))
    for place in PLACES:
        if own.peak(place):
            peaks = (format_bytes(rank.peak.get(place, 0)) for rank in stages)
            table.add_row("most at a moment", place, *peaks, style="bold")
    console.print(table)
    console.print(
        f"the fullest moment: {max(own.ranks, key=lambda rank: sum(rank.peak.values())).moment}", highlight=False
    )


def _print_step(console: Any, own: Plan, cluster: Cluster) -> None:
    from megamem.observe.progress import format_bytes

    wires = {wire: max(sent.get(wire, 0.0) for sent in own.traffic) for sent in own.traffic for wire in sent}
    shown = ", ".join(f"{wire} {format_bytes(int(nbytes))}" for wire, nbytes in wires.items()) or "nothing"
    console.print(f"\nsent by a rank per step: {shown}", highlight=False)
    if own.time is None:
        console.print("no time is estimated: the hardware has no ceilings (megamem profile --ceilings measures them)")
        return
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in own.time.parts.items())
    console.print(f"step: {own.time.seconds:.3g} s ({parts})", highlight=False)
    from megamem_launch.plan.memory import precision_on

    peak = cluster.hardware.peak_tflops(precision_on(own.config, cluster.hardware))
    share = f", {own.utilisation(peak):.0%} MFU" if peak else ""
    source = cluster.hardware.ceilings.source
    console.print(f"{own.tokens_per_second:,.0f} tokens/s{share}, estimated from ceilings: {source}", highlight=False)


def _print_ranked(console: Any, ranked: list[Plan], seen: int, cluster: Cluster) -> None:
    from rich.table import Table

    from megamem.observe.progress import format_bytes

    near = "device" if cluster.hardware.on_gpu else "host"
    table = Table(
        title=f"\nthe {'fastest' if ranked[0].time else 'smallest'} of {seen} layouts on {cluster.name}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in (
        "tp",
        "pp",
        "vpp",
        "cp",
        "ep",
        "zero",
        "micro-batch",
        "recompute",
        "tokens/s",
        "s/step",
        "bubble",
        near,
    ):
        table.add_column(name, justify="right")
    for one in ranked:
        layout, seconds = one.layout, one.time.seconds if one.time else 0.0
        bubble = one.time.parts.get("bubble", 0.0) / seconds if one.time else 0.0
        table.add_row(
            *map(str, (layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep, one.config.optimizer.zero_stage)),
            str(one.config.train.micro_batch_size),
            one.config.train.recompute,
            f"{one.tokens_per_second:,.0f}" if one.time else "-",
            f"{seconds:.3g}" if one.time else "-",
            f"{bubble:.0%}" if one.time else "-",
            format_bytes(one.peak(near)),
        )
    console.print(table)
    console.print(f"the first: {' '.join(ranked[0].settings)}", highlight=False, soft_wrap=True)
