"""``torchrun -m megamem_launch.pretrain CONFIG [section.setting=value ...]``: ``megamem train`` as one of torchrun's ranks."""

from __future__ import annotations

import sys

from megamem import cli


def main() -> int:
    """Train as the rank that the environment names."""
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
