"""Warnings of libraries that a user can do nothing about."""

from __future__ import annotations

import os
import warnings

_ABSENT = ("Transformer Engine and Apex are not installed", "Apex is not installed")


def silence_libraries() -> None:
    """Keep warnings that megamem answers for itself off the terminal, here and in processes started from here.

    megatron-core says on import which optional GPU libraries it lacks, and torch that megatron-core calls functions by their
    former names; megamem needs neither.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    others = os.environ.get("PYTHONWARNINGS", "")
    mine = [filter_ for text in _ABSENT if (filter_ := f"ignore:{text}:UserWarning") not in others]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [others, *mine]))
