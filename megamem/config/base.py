"""Typed configuration trees: strict construction from plain data, and back.

A configuration is a tree of ``@dataclass(kw_only=True, slots=True)`` classes whose leaves are numbers, strings, booleans and
lists or tuples of these. Every class may define ``__post_init__`` for checks of its own fields (raising
:class:`~megamem.errors.ConfigError`); checks across sections belong to whoever owns the tree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from megamem.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Construct ``cls`` from nested plain data; an unknown key or a value of the wrong type raises ConfigError."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or cls.__name__} must be a mapping of settings, not {_describe(data)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise unknown_key(where, str(key), fields)
        values[key] = convert(hints[key], value, where)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{path}.{name} is missing; set it" if path else f"{name} is missing; set it")
    try:
        return cls(**values)
    except ConfigError as error:
        if path and not str(error).startswith(path):
            raise ConfigError(f"{path}: {error}") from None
        raise


def unknown_key(where: str, key: str, known: typing.Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, naming the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(names)}"
    return ConfigError(f"unknown setting `{where}`: {hint}")


def convert(hint: Any, value: Any, where: str) -> Any:
    """Check ``value`` against a type hint, converting only where nothing is lost (1 to 1.0, list to tuple)."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is Literal:
        if isinstance(value, bool) and value not in get_args(hint):
            value = "on" if value else "off"  # YAML reads these words as booleans
        if value in get_args(hint):
            return value
        allowed = ", ".join(map(str, get_args(hint)))
        near = difflib.get_close_matches(str(value), [str(a) for a in get_args(hint)], n=1)
        suffix = f" (did you mean `{near[0]}`?)" if near else ""
        raise ConfigError(f"{where} is {value!r}; set one of: {allowed}{suffix}")
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin in (list, tuple):
        return _convert_sequence(hint, value, where)
    if origin is dict:
        _, item = get_args(hint)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, not {_describe(value)}")
        return {str(k): convert(item, v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    options = get_args(hint)
    if value is None and type(None) in options:
        return None
    error: ConfigError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(option, value, where)
        except ConfigError as failure:
            error = error or failure
    assert error is not None
    raise error


def _convert_sequence(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list, not {_describe(value)}")
    item = get_args(hint)[0]
    converted = [convert(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
    return tuple(converted) if get_origin(hint) is tuple else converted


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        if hint is float and not math.isfinite(value):
            raise ConfigError(f"{where} is {value}; set a finite number")
        return value
    raise ConfigError(f"{where} must be {_NAMES.get(hint, hint.__name__)}, not {_describe(value)}")


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _describe(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def at_least(section: Any, minimum: float, *names: str) -> None:
    """For ``__post_init__``: ConfigError for the first of these settings of ``section`` that is below ``minimum``."""
    for name in names:
        value = getattr(section, name)
        if value < minimum:
            raise ConfigError(f"{name} is {value}; set it to at least {minimum}")


def above_zero(section: Any, *names: str) -> None:
    """For ``__post_init__``: ConfigError for the first of these settings of ``section`` that is not above 0."""
    for name in names:
        value = getattr(section, name)
        if value <= 0:
            raise ConfigError(f"{name} is {value}; set a value above 0")


def to_dict(config: Any) -> Any:
    """The plain data of a tree: what :func:`build` takes back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(item) for key, item in config.items()}
    return config


def merge(base: Mapping[str, Any], delta: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the leaves of ``delta`` on top. Dotted keys of ``delta`` reach into sections; lists are replaced."""
    result = {k: (dict(v) if isinstance(v, Mapping) else v) for k, v in base.items()}
    for key, value in delta.items():
        head, _, rest = str(key).partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, Mapping):
            below = result.get(head)
            result[head] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            result[head] = value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=v`` as nested plain data; ``v`` is read as YAML, so ``[1,2]``, ``true`` and ``1e-3`` mean what they say."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {text!r} must have the form section.setting=value")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"override {text!r}: the value is not valid YAML ({problem})") from None
    return merge({}, {key.strip(): parsed})
