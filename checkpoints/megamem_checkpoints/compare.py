"""Whether a checkpoint and a run are of the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megamem.errors import CheckpointError

_FREE = {
    "model.attention_backend",
    "model.init_method_std",
    "model.moe.aux_loss_coeff",
    "model.moe.bias_update_rate",
    "model.moe.token_dispatcher",
    "memory.engram.init_std",
    "memory.bank.init_std",
    "memory.bank.generic_probability",
}
"""Settings that may change between runs of one model: how it is computed, initialised or trained, not what it is."""


def compare_models(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """CheckpointError naming the first setting of ``model``, ``memory.engram`` or ``memory.bank`` in which two checkpoint
    metas differ; where rows are kept and how they are trained may change.

    Both are the ``meta`` of :meth:`megamem_checkpoints.checkpointer.Checkpointer.save`, with the resolved
    configuration under ``config``. A setting that only one of them knows (another release wrote it) is left to the
    check of names and shapes.
    """
    for section in ("model", "memory.engram", "memory.bank"):
        parts = _part(saved["config"], section), _part(current["config"], section)
        for name, there, here in _differences(*parts, section):
            raise CheckpointError(
                f"the checkpoint is of another model: {name} is {there!r} there and {here!r} in this run; "
                f"set {name}={there}, or give this run another name and no checkpoint"
            )


def _differences(saved: Any, current: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if name in _FREE:
        return
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in saved:
            if key in current:
                yield from _differences(saved[key], current[key], f"{name}.{key}")
    elif _plain(saved) != _plain(current):
        yield name, saved, current


def _part(config: Mapping[str, Any], path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
