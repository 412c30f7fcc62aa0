"""``python -m megamem_launch.supervise.agent RUN_DIR CONFIG HOST:PORT NODES RANKS_PER_NODE``: starts the ranks of one node.

Ranks meet at ``HOST:PORT``, a store on the first node. Node ``i`` in SLURM's order gets the ranks from ``i * RANKS_PER_NODE`` on:
the static rendezvous keeps that order, so groups of neighbouring ranks stay within nodes, and there is no election to go wrong.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from megamem.observe.heartbeat import node_name
from megamem_launch import rundir
from megamem_launch.supervise.rank import TERMINATE, limit_threads, record_failure


def main(argv: list[str]) -> int:
    """Run the ranks of this node to their end: 0, or 2 where a rank met what a person must mend, else 1."""
    run_dir, config, endpoint = Path(argv[0]), argv[1], argv[2]
    nodes, ranks = int(argv[3]), int(argv[4])
    incarnation = os.environ[rundir.INCARNATION]
    node = int(os.environ["SLURM_NODEID"]) if nodes > 1 else 0
    live = rundir.live_dir(run_dir, incarnation)
    _outlive_signals(live / f"{TERMINATE}{node_name()}")
    limit_threads(ranks)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id=incarnation,
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": node},
        max_restarts=0,  # the supervisor starts all nodes again
        signals_to_handle="SIGINT",
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say themselves what is wrong
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", "megamem_launch.supervise.rank", str(run_dir), config)
    except ChildFailedError as error:
        for local, failure in error.failures.items():
            if failure.exitcode not in (-signal.SIGTERM, 128 + signal.SIGTERM):  # which is how the others were stopped
                with contextlib.suppress(OSError):
                    record_failure(live, node * ranks + local % ranks, _how(failure.exitcode), failure.exitcode)
        return 2 if any(failure.exitcode == 2 for failure in error.failures.values()) else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _how(code: int) -> str:
    if code < 0:
        return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


def _outlive_signals(marker: Path) -> None:
    """What SLURM sends to all processes of a step must not end the agent, whose ranks would die with it: it may be meant for the
    ranks alone (SIGUSR2, their stacks), or announce preemption (SIGTERM, told to the supervisor by a file)."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def note(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            marker.touch()

    signal.signal(signal.SIGTERM, note)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
