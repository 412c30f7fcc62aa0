"""Parsing the arguments of a verb."""

from __future__ import annotations

import inspect
import sys
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(arguments: type[T], argv: list[str], verb: str) -> T:
    """The arguments of ``megamem <verb>``. ``--help`` shows the whole docstring of the class, examples included.

    Ends the process as argparse does: code 0 after ``--help``, 2 with a message for arguments that do not parse.
    """
    if argv in (["-h"], ["--help"]):
        print(inspect.getdoc(arguments), end="\n\n", file=sys.stdout)
    return tyro.cli(
        arguments, args=argv, prog=f"megamem {verb}", description="", config=(tyro.conf.FlagCreatePairsOff,)
    )
