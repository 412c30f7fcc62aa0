"""A SLURM cluster on this machine to try things on by hand: start, break, mend, stop."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from megamem.testing.slurm_cluster.cluster import ClusterError, SlurmCluster
from megamem.testing.slurm_cluster.packages import missing_packages


def main(arguments: list[str] | None = None) -> int:
    """Start, break, mend or stop a cluster; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megamem.testing.slurm_cluster", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    start = actions.add_parser("start", help="start a cluster that runs until it is stopped")
    start.add_argument("directory", type=Path)
    start.add_argument("--nodes", type=int, default=2)
    start.add_argument("--cpus", type=int, default=4, help="of each node")
    start.add_argument("--memory-mb", type=int, default=8000, help="of each node")
    start.add_argument("--gpus", type=int, default=2, help="fake ones of each node")
    start.add_argument("--isolate", choices=("auto", "namespaces", "none"), default="auto")
    for action in ("kill-node", "kill-slurmd", "start-node"):
        parsed = actions.add_parser(action)
        parsed.add_argument("directory", type=Path)
        parsed.add_argument("node")
    actions.add_parser("stop", help="kill its processes").add_argument("directory", type=Path)
    actions.add_parser("missing", help="print the Debian packages that have to be installed first")
    given = parser.parse_args(arguments)
    if given.action == "missing":
        print(*missing_packages())
        return 0
    try:
        if given.action == "start":
            options = {name: getattr(given, name) for name in ("cpus", "memory_mb", "gpus", "isolate")}
            cluster = SlurmCluster.start(given.directory, given.nodes, keep=False, **options)
            print(f"# {given.nodes} nodes idle after {cluster.start_seconds:.2f} s; for SLURM's commands:")
            print(f"export SLURM_CONF={shlex.quote(cluster.env['SLURM_CONF'])}")
            return 0
        cluster = SlurmCluster.attach(given.directory)
        if given.action == "stop":
            cluster.stop()
        else:
            getattr(cluster, given.action.replace("-", "_"))(given.node)
    except (ClusterError, FileNotFoundError) as error:
        print(f"slurm_cluster: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
