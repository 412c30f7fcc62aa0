"""The table of rules: for each architecture, what every canonical tensor is called there and how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megamem.models.config import ModelConfig


class Form(Protocol):
    """How one canonical tensor lies in one or more exported ones. Works on meta tensors too."""

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Exported tensor ``index`` of a canonical one."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The canonical tensor of all its exported ones, in order."""


class Same:
    """One tensor, as it is."""

    def part(self, tensor: Tensor, index: int) -> Tensor:
        return tensor

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]


class OnePlus:
    """The weight of a zero-centred norm as the scale ``1 + weight``. Rounds, in fp32 by up to 6e-8 of the scale."""

    def part(self, tensor: Tensor, index: int) -> Tensor:
        return 1 + tensor

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] - 1


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """An embedding without the rows that pad it to a multiple; on the way back they are zero."""

    entries: int
    rows: int

    def part(self, tensor: Tensor, index: int) -> Tensor:
        return tensor[: self.entries]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return F.pad(parts[0], (0, 0, 0, self.rows - self.entries))


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """Queries, keys and values: megatron stores, for each key/value head, its query heads, the key and the value."""

    groups: int
    heads: int
    """Query heads of one group."""
    head_dim: int

    def part(self, tensor: Tensor, index: int) -> Tensor:
        grouped = tensor.view(self.groups, self.heads + 2, self.head_dim, tensor.shape[1])
        rows = (slice(0, -2), slice(-2, -1), slice(-1, None))[index]
        return grouped[:, rows].reshape(-1, tensor.shape[1])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.view(self.groups, -1, self.head_dim, part.shape[1]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of one kind of canonical tensor. Names hold ``{layer}``, ``{expert}`` and ``{level}``."""

    source: str
    targets: tuple[str, ...]
    form: Form


def rules_of(family: str, model: ModelConfig) -> list[Rule]:
    """The rules of an architecture of :data:`LAYERS` for a model of this shape."""
    norm: Form = OnePlus() if family != "megamem" and model.layernorm_zero_centered_gamma else Same()
    embedding = Vocabulary(model.vocab_size, model.padded_vocab_size)
    heads = model.num_attention_heads // model.num_query_groups
    ours, theirs = "decoder.layers.{layer}.", "model.layers.{layer}."
    return [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), embedding),
        Rule("output_layer.weight", ("lm_head.weight",), embedding),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), norm),
        Rule(
            f"{ours}self_attention.linear_qkv.weight",
            tuple(f"{theirs}self_attn.{name}_proj.weight" for name in "qkv"),
            GroupedQKV(model.num_query_groups, heads, model.head_dim),
        ),
        *(
            Rule(ours + source, (theirs + target,), norm if source.endswith("_layernorm.weight") else Same())
            for source, target in LAYERS[family].items()
        ),
    ]


def _swiglu(ours: str, theirs: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, str]:
    sources = ("linear_fc1.gate", "linear_fc1.up", "linear_fc2")
    return {f"{ours}{source}.weight": f"{theirs}{name}.weight" for source, name in zip(sources, names, strict=True)}


_COMMON = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_DENSE = _swiglu("mlp.", "mlp.")
_EXPERTS = {"mlp.router.weight": "mlp.gate.weight", **_swiglu("mlp.experts.{expert}.", "mlp.experts.{expert}.")}
_MEMORIES = {
    **{
        f"engram.{name}.weight": f"engram.{name}.weight"
        for name in ("key_proj", "value_proj", "norm_key", "norm_query", "norm_conv")
    },
    "engram.conv.weight": "engram.conv_weight",
    "engram.table": "engram.table.weight",
    "bank.level{level}.table": "bank.level{level}.weight",
}

LAYERS: dict[str, dict[str, str]] = {
    "megamem": {
        **_COMMON,
        **_QK_NORM,
        **_DENSE,
        **_EXPERTS,
        **_swiglu("mlp.shared_experts.", "mlp.shared_experts."),
        "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
        **_MEMORIES,
    },
    "llama": {**_COMMON, **_DENSE},
    "qwen3": {**_COMMON, **_QK_NORM, **_DENSE},
    "qwen3_moe": {**_COMMON, **_QK_NORM, **_DENSE, **_EXPERTS},
    "mixtral": {
        **_COMMON,
        "mlp.router.weight": "block_sparse_moe.gate.weight",
        **_swiglu("mlp.experts.{expert}.", "block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2")),
    },
}
"""Canonical tensor of a layer to the architecture's, for tensors that keep their layout (but for norms, see :class:`OnePlus`)."""
