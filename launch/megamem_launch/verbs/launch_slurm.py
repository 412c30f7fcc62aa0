"""``megamem launch slurm`` and ``megamem launch data``: from a configuration and a cluster to submitted jobs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megamem.errors import ConfigError
from megamem_launch.cluster import Cluster, load_cluster
from megamem_launch.config import load_config
from megamem_launch.slurm.data_array import launch_data
from megamem_launch.slurm.sweep import launch_sweep, read_sweep
from megamem_launch.slurm.training import Submitted, launch_training
from megamem_launch.verbs.parse import flags_last, parse

Overrides = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETTING=VALUE")]
ConfigFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
ClusterFile = Annotated[Path, tyro.conf.arg(metavar="FILE")]
Settings = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="SETTING=VALUE")]


@dataclass
class SlurmArguments:
    """Submit a run to SLURM.

    Checks that the layout fits the nodes, asks SLURM whether it would take the job, keeps script, resolved settings, code
    revision and environment (without secrets) in RUN/launch/submission-N, and submits. The job's supervisor saves and requeues
    it before its time ends, and starts again without the nodes that were lost. What is refused leaves nothing behind.

    --chain N submits N jobs that go on from each other until the run is finished or the time of the last one is over. --sweep FILE
    submits one array that trains a run for each point; FILE has `grid: {setting: [values]}`, `points: [{setting: value}]`, or
    both, and `at_once: N`.

    Examples:
      megamem launch slurm my.yaml --cluster configs/clusters/slurm_8xh100.yaml --dry-run
      megamem launch slurm my.yaml train.steps=5000 --cluster my_cluster.yaml --nodes 4 --time 24:00:00 --account physics
      megamem launch slurm my.yaml --cluster my_cluster.yaml --chain 5
      megamem launch slurm my.yaml name=rates --cluster my_cluster.yaml --sweep rates.yaml
    """

    config: ConfigFile
    """YAML file of a run, or the directory of one."""
    cluster: ClusterFile
    """YAML file that describes the cluster; configs/clusters has some."""
    overrides: Overrides = ()
    """Settings of the run to change, as section.setting=value."""
    nodes: int = 0
    """Nodes in place of the description's."""
    time: str = ""
    """Time limit of a job in place of the description's: minutes, HH:MM:SS or D-HH:MM:SS."""
    partition: str = ""
    """Partition in place of the description's."""
    account: str = ""
    """Account in place of the description's."""
    qos: str = ""
    """Quality of service in place of the description's."""
    mode: Literal["torchrun", "srun", ""] = ""
    """How ranks start, in place of the description's: one task of SLURM per node, or per rank."""
    settings: Settings = ()
    """Further settings of the cluster to change, such as slurm.requeue=false; may be given several times."""
    chain: int = 1
    """Jobs that follow each other."""
    sweep: str = ""
    """YAML file of a sweep."""
    dry_run: bool = False
    """Print the script and what SLURM thinks of it; submit and keep nothing."""


@dataclass
class DataArguments:
    """Prepare the corpus of a configuration with SLURM: the tokenizer, then an array of shares, then the merge.

    Shares are cut between the files of the sources; tokenizer, tokens and cluster paths are those of `megamem data prepare`, byte
    for byte. Scripts and logs are in data.path + ".parts".

    Examples:
      megamem launch data my.yaml --cluster my_cluster.yaml --shards 32 --time 2:00:00
    """

    config: ConfigFile
    """YAML file of a run; its sections data, memory.bank and train.seed are used."""
    cluster: ClusterFile
    """YAML file that describes the cluster."""
    shards: int
    """Shares, each a task of the array."""
    overrides: Overrides = ()
    """Settings to change, as section.setting=value."""
    time: str = ""
    """Time limit of each job in place of the description's."""
    partition: str = ""
    """Partition in place of the description's."""
    account: str = ""
    """Account in place of the description's."""
    qos: str = ""
    """Quality of service in place of the description's."""
    settings: Settings = ()
    """Further settings of the cluster to change."""
    strict: bool = False
    """Refuse text that is not valid UTF-8, as `megamem data prepare --strict` does."""
    dry_run: bool = False
    """Print the scripts and what SLURM thinks of them; submit and keep nothing."""


def main(action: Literal["slurm", "data"], argv: list[str]) -> int:
    """Entry of both actions."""
    if action == "slurm":
        return _slurm(parse(SlurmArguments, flags_last(SlurmArguments, argv), "launch slurm"))
    return _data(parse(DataArguments, flags_last(DataArguments, argv), "launch data"))


def _slurm(arguments: SlurmArguments) -> int:
    cluster = _cluster(arguments, nodes=arguments.nodes, mode=arguments.mode)
    if arguments.sweep:
        if arguments.chain != 1:
            raise ConfigError(
                "--chain and --sweep exclude each other; points of a sweep are requeued until they are done"
            )
        sweep = read_sweep(Path(arguments.sweep))
        done = launch_sweep(arguments.config, arguments.overrides, sweep, cluster, dry_run=arguments.dry_run)
    else:
        config = load_config(arguments.config, arguments.overrides)
        done = launch_training(config, arguments.overrides, cluster, chain=arguments.chain, dry_run=arguments.dry_run)
    return _tell(done)


def _data(arguments: DataArguments) -> int:
    config = load_config(arguments.config, arguments.overrides)
    cluster = _cluster(arguments)
    done = launch_data(
        config,
        arguments.overrides,
        cluster,
        shards=arguments.shards,
        strict=arguments.strict,
        dry_run=arguments.dry_run,
    )
    return _tell(done)


def _cluster(arguments: SlurmArguments | DataArguments, nodes: int = 0, mode: str = "") -> Cluster:
    changed = [(f"--set {text}", text) for text in arguments.settings]
    if nodes:
        changed.append((f"--nodes {nodes}", f"nodes={nodes}"))
    if mode:
        changed.append((f"--mode {mode}", f"slurm.mode={mode}"))
    for name in ("time", "partition", "account", "qos"):
        if value := getattr(arguments, name):
            changed.append((f"--{name} {value}", f"slurm.{name}={_quoted(value)}"))
    return load_cluster(arguments.cluster, [text for _, text in changed], [option for option, _ in changed])


def _quoted(value: str) -> str:
    """As YAML that is text whatever it looks like: ``10:00:00`` would be a number."""
    return "'" + value.replace("'", "''") + "'"


def _tell(done: Submitted) -> int:
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    if not done.job_ids:
        print(done.script, end="")
        print(f"dry run, nothing was submitted or written; SLURM says: {done.answer}", file=sys.stderr)
        return 0
    jobs = f"jobs {', '.join(done.job_ids)}" if len(done.job_ids) > 1 else f"job {done.job_ids[0]}"
    print(f"submitted {jobs}: {done.run_dir}")
    print(f"megamem launch status {done.run_dir}")
    return 0
