"""Parsing the arguments of a verb."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import textwrap
import typing
from typing import Any, TypeVar

import tyro

from megamem.config.describe import settings as describe_settings

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


def print_settings(cls: type[Any]) -> None:
    """Print every setting of a configuration class with its default and what it means, in the form that the command line takes."""
    for setting in describe_settings(cls):
        print(f"{setting.name}={json.dumps(setting.default)}")
        print(textwrap.fill(setting.text, 100, initial_indent="    ", subsequent_indent="    "))


def flags_last(arguments: type[object], argv: list[str]) -> list[str]:
    """``argv`` with what stands for itself before all flags and their values, so that settings may stand on either side."""
    hints = typing.get_type_hints(arguments)
    switches = {f.name.replace("_", "-") for f in dataclasses.fields(arguments) if hints[f.name] is bool}  # type: ignore[arg-type]
    positional, flags = [], []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith("-"):
            positional.append(argument)
            continue
        flags.append(argument)
        takes_value = "=" not in argument and argument not in ("-h", "--help") and argument.lstrip("-") not in switches
        if takes_value and (value := next(rest, None)) is not None:
            flags.append(value)
    return positional + flags
