"""What a run inherits from the Hugging Face model that it was imported from and training leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def context_length(meta: Mapping[str, Any]) -> int:
    """Positions of the exported model: those it was trained on in a checkpoint of ``meta``, or was before the import."""
    return max(int(meta["config"]["data"]["seq_length"]), int(_imported(meta).get("max_position_embeddings", 0)))


def special_tokens(meta: Mapping[str, Any]) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``: of the imported model, else the end-of-document token for the
    latter two. Several ids end a text where they did so before, and the end-of-document token always does."""
    end = int(meta["eos_id"])
    imported = _imported(meta)
    if "eos_token_id" not in imported:
        return {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    found = {name: imported.get(name) for name in SPECIAL_TOKENS}
    return found | {"eos_token_id": _with_end(found["eos_token_id"], end)}


def generation_settings(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``generation_config.json``: of the imported model, ended as in :func:`special_tokens`."""
    tokens = special_tokens(meta)
    settings = _imported(meta).get("generation_config") or {k: v for k, v in tokens.items() if v is not None}
    ends = settings.get("eos_token_id", tokens["eos_token_id"])
    return settings | {"eos_token_id": _with_end(ends, int(meta["eos_id"]))}


def _imported(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    return meta.get("imported") or {}


def _with_end(ids: int | list[int] | None, end: int) -> int | list[int]:
    if ids is None or ids == end:
        return end
    several = ids if isinstance(ids, list) else [ids]
    return ids if end in several else [*several, end]
