"""Ranks on this machine, started with torchrun's library."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the ranks ended early."""

    text: str
    """What happened, for ``megamem VERB: {text}``."""
    code: int
    """Exit code for the launcher: 2 where a rank said itself what is wrong."""


def run_ranks(nproc: int, module: str, arguments: Sequence[str]) -> Failure | None:
    """Run ``python -m module *arguments`` on ``nproc`` ranks and wait; None when all ended well. The first failure of any rank
    ends all of them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"megamem-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say themselves what is wrong
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:
            return Failure("", 2)
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        return Failure(f"rank {rank} ended with {how}, so all ranks were stopped", 1)
    except SignalException as error:
        return Failure(f"interrupted by signal {error.sigval}", 128 + error.sigval)
    return None
