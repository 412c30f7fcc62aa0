"""``torchrun -m megamem_launch.pretrain CONFIG [section.setting=value ...]``: ``megamem train`` as one of torchrun's ranks."""

from __future__ import annotations

import ctypes
import signal
import sys

from megamem import cli

_PR_SET_PDEATHSIG = 1  # of prctl(2)


def main(verb: str = "train") -> int:
    """Train, or what else ``verb`` does, as the rank that the environment names."""
    if sys.platform == "linux":
        # A launcher that is killed cannot stop its ranks, which would train on and keep the run's lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return cli.main([verb, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
