"""The kinds of models that a checkpoint can be exported as, by the word after ``megamem export --to``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from megamem.errors import ExportError
from megamem_checkpoints.hf.plan import ExportPlan
from megamem_checkpoints.hf.source import Source


@dataclass(frozen=True, slots=True)
class Target:
    """A function ``plan(source: Source, **options) -> ExportPlan``, imported when it is used."""

    module: str
    """The module that has the function ``plan``."""
    options: frozenset[str] = frozenset()
    """Keyword arguments that ``plan`` takes beside the source."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments that are the target's own."""


_MEMORY_FREE = ("megamem_checkpoints.hf.native.memory_free", frozenset({"merge_path"}))

TARGETS: dict[str, Target] = {
    "megamem": Target("megamem_checkpoints.hf.megamem", frozenset({"table_files", "table_format"})),
    "qwen4_exp": Target("megamem_checkpoints.hf.native.qwen4_exp", frozenset({"table_files"})),
    "llama": Target(*_MEMORY_FREE, {"family": "llama"}),
    "qwen3": Target(*_MEMORY_FREE, {"family": "qwen3"}),
    "qwen3_moe": Target(*_MEMORY_FREE, {"family": "qwen3_moe"}),
    "mixtral": Target(*_MEMORY_FREE, {"family": "mixtral"}),
    "native": Target(*_MEMORY_FREE),
}


def plan_export(name: str, source: Source, options: Mapping[str, Any]) -> ExportPlan:
    """What the export of ``source`` as ``name`` writes; options that are None are not set.

    ExportError for an unknown target, for an option that it does not take, and for a model that it cannot express.
    """
    if name not in TARGETS:
        raise ExportError(f"there is no export to {name}; choose one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    given = {option: value for option, value in options.items() if value is not None}
    if foreign := sorted(given.keys() - target.options):
        raise ExportError(f"an export to {name} has no {foreign[0]}; leave --{foreign[0].replace('_', '-')} out")
    return import_module(target.module).plan(source, **target.settings, **given)
