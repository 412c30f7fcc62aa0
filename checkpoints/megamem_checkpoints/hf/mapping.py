"""Names of a checkpoint's tensors and of the same tensors in a Hugging Face model, either way.

What becomes of a tensor says one table, :mod:`megamem_checkpoints.hf.mapping_rules`; here it is read in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megamem.errors import ExportError
from megamem.models.config import ModelConfig
from megamem_checkpoints.hf.mapping_rules import Rule, rules_of

Part = Callable[[Tensor], Tensor]
"""Cuts one exported tensor out of a canonical one; works on meta tensors too."""

_ADVICE = "export a checkpoint whose configuration describes its tensors"


@dataclass(frozen=True, slots=True)
class Weight:
    """One exported tensor and where it comes from."""

    name: str
    source: str
    part: Part


@dataclass(frozen=True, slots=True)
class Gathered:
    """One canonical tensor and the tensors of a Hugging Face model that it is made of."""

    name: str
    parts: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor]


def map_names(sources: Iterable[str], model: ModelConfig, family: str = "megamem") -> list[Weight]:
    """The exported tensors of canonical ``sources``; ExportError for a tensor that no rule of ``family`` covers."""
    rules = [(_pattern(rule.source), rule) for rule in rules_of(family, model)]
    weights = []
    for source in sources:
        rule, numbers = _find(source, rules)
        if rule is None:
            raise ExportError(
                f"checkpoint tensor {source} has no place in a {family} model; choose another target, or add a rule for "
                "it to megamem_checkpoints/hf/mapping_rules.py"
            )
        weights += [
            Weight(target.format(**numbers), source, partial(rule.form.part, index=index))
            for index, target in enumerate(rule.targets)
        ]
    return weights


def gather_names(names: Iterable[str], model: ModelConfig, family: str) -> list[Gathered]:
    """The canonical tensors that the tensors ``names`` of a ``family`` model make up, in the order of their first parts.

    ExportError for a name that no rule covers, and for a canonical tensor that lacks a part.
    """
    rules = [(_pattern(target), rule) for rule in rules_of(family, model) for target in rule.targets]
    names = list(names)
    gathered: dict[str, Gathered] = {}
    for name in names:
        rule, numbers = _find(name, rules)
        if rule is None:
            raise ExportError(
                f"tensor {name} is none that a {family} model has by its config.json; name a checkpoint of a plain {family} model"
            )
        source = rule.source.format(**numbers)
        parts = tuple(target.format(**numbers) for target in rule.targets)
        gathered.setdefault(source, Gathered(source, parts, rule.form.join))
    present = set(names)
    for item in gathered.values():
        for part in item.parts:
            if part not in present:
                raise ExportError(f"tensor {part} is missing; name a complete checkpoint")
    return list(gathered.values())


def check_complete(
    exported: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, advice: str = _ADVICE
) -> None:
    """ExportError, ending in ``advice``, unless the tensors are exactly those of the model, shape by shape."""
    missing, unexpected = sorted(expected.keys() - exported.keys()), sorted(exported.keys() - expected.keys())
    if missing:
        raise ExportError(
            f"the checkpoint gives no value for {missing[0]} ({len(missing)} tensors are missing); {advice}"
        )
    if unexpected:
        raise ExportError(
            f"the checkpoint holds {unexpected[0]}, which its configuration does not describe ({len(unexpected)} tensors); "
            f"{advice}"
        )
    for name, shape in expected.items():
        if exported[name] != shape:
            raise ExportError(
                f"{name} has shape {list(exported[name])} in the checkpoint and {list(shape)} by its configuration; {advice}"
            )


def _find(name: str, rules: Iterable[tuple[re.Pattern[str], Rule]]) -> tuple[Rule | None, dict[str, str]]:
    for pattern, rule in rules:
        if match := pattern.fullmatch(name):
            return rule, match.groupdict()
    return None, {}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(name)))
