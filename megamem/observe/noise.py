"""Warnings of libraries that a user can do nothing about."""

from __future__ import annotations

import os
import warnings

_APEX = "Transformer Engine and Apex are not installed"


def silence_libraries() -> None:
    """Keep warnings that megamem answers for itself off the terminal, here and in processes started from here.

    megatron-core says on import which optional GPU libraries it lacks, and torch that megatron-core calls functions by their
    former names; megamem needs neither.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    mine = f"ignore:{_APEX}:UserWarning"
    others = os.environ.get("PYTHONWARNINGS", "")
    if mine not in others:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [others, mine]))
