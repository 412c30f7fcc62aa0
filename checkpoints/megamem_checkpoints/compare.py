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


def compare_models(saved: Mapping[str, Any], current: Mapping[str, Any], *, new_memories: bool = False) -> None:
    """CheckpointError naming the first setting of ``model``, ``memory.engram`` or ``memory.bank`` in which two checkpoint
    metas differ; where rows are kept and how they are trained may change.

    Both are the ``meta`` of :meth:`megamem_checkpoints.checkpointer.Checkpointer.save`, with the resolved
    configuration under ``config`` and, where both have it, ``tokenizer_sha256``, which must be the same. A setting that
    only one of them knows (another release wrote it) is left to the check of names and shapes. With ``new_memories`` the
    run may have memories on layers where the checkpoint has none, or of a kind that it lacks; what it has must be addressed as
    it was.
    """
    sections, free = ["model", "memory.engram", "memory.bank"], _FREE
    if new_memories:
        memory = saved["config"]["memory"]
        has = {
            "model": True,
            "memory.engram": bool(memory["engram"]["layers"]),
            "memory.bank": any(memory["bank"]["units"]),
        }
        sections = [name for name in sections if has[name]]
        free = _FREE | {"memory.engram.layers", "memory.bank.layers"}
    for section in sections:
        parts = _part(saved["config"], section), _part(current["config"], section)
        for name, there, here in differences(*parts, section):
            if name not in free and there is not None and here is not None:
                raise CheckpointError(
                    f"the checkpoint is of another model: {name} is {there!r} there and {here!r} in this run; "
                    f"set {name}={there}, or give this run another name and no checkpoint"
                )
    tokenizers = [meta.get("tokenizer_sha256") for meta in (saved, current)]
    if None not in tokenizers and len(set(tokenizers)) > 1:
        raise CheckpointError(
            f"the checkpoint's model reads the tokens of another tokenizer (sha256 {tokenizers[0]:.12} there, "
            f"{tokenizers[1]:.12} in data.path); prepare the data with that one, through data.tokenizer.model"
        )


def differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two trees of plain data differ, by dotted name, with both values; None where one lacks it."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key), b.get(key), f"{name}.{key}" if name else str(key))
    elif _plain(a) != _plain(b):
        yield name, a, b


def _part(config: Mapping[str, Any], path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
