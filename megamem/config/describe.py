"""Every setting of a configuration tree with its default and the sentence that documents it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from megamem.config.base import to_dict


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree."""

    name: str
    """Dotted, as the command line takes it."""
    default: Any
    text: str
    """The docstring under the field, in one paragraph; empty where it has none."""


def settings(cls: type[Any], path: str = "") -> Iterator[Setting]:
    """The settings below a configuration class, in the order of the source."""
    hints, texts = typing.get_type_hints(cls), _field_docstrings(cls)
    for field in dataclasses.fields(cls):
        name = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from settings(hints[field.name], name)
        else:
            factory = field.default_factory  # not the value of an instance, which may have filled it in
            default = field.default if factory is dataclasses.MISSING else factory()
            yield Setting(name, to_dict(default), texts.get(field.name, ""))


def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """String literals that stand right under annotated fields, which Python itself throws away."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            texts[field.target.id] = " ".join(below.value.value.split()).replace("``", "")
    return texts
