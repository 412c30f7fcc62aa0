"""``torchrun -m megamem_launch.profile CONFIG ...``: ``megamem profile`` as one of torchrun's ranks."""

from __future__ import annotations

import sys

from megamem_launch.pretrain import main

sys.exit(main("profile"))
