"""Names and shapes of a checkpoint's tensors, and of the same tensors in the exported model.

One table of rules says what becomes of every canonical tensor. Norm scales are copied as they are: both sides use
``1 + weight``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megamem.errors import ExportError
from megamem.models.config import ModelConfig

Part = Callable[[Tensor], Tensor]
"""Cuts one exported tensor out of a canonical one; works on meta tensors too."""

_ADVICE = "export a checkpoint whose configuration describes its tensors"


@dataclass(frozen=True, slots=True)
class Weight:
    """One exported tensor and where it comes from."""

    name: str
    source: str
    part: Part


def map_names(sources: Iterable[str], model: ModelConfig) -> list[Weight]:
    """The exported tensors of canonical ``sources``; ExportError for a tensor that no rule covers."""
    rules = [(_pattern(source), targets) for source, targets in _rules(model).items()]
    weights = []
    for source in sources:
        for pattern, targets in rules:
            if match := pattern.fullmatch(source):
                weights += [Weight(name.format(**match.groupdict()), source, part) for name, part in targets.items()]
                break
        else:
            raise ExportError(
                f"checkpoint tensor {source} has no place in the exported model; add a rule for it to "
                "megamem_checkpoints/hf/mapping.py"
            )
    return weights


def check_complete(exported: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ExportError unless the exported tensors are exactly those of the model, shape by shape."""
    missing, unexpected = sorted(expected.keys() - exported.keys()), sorted(exported.keys() - expected.keys())
    if missing:
        raise ExportError(
            f"the checkpoint gives no value for {missing[0]} ({len(missing)} tensors are missing); {_ADVICE}"
        )
    if unexpected:
        raise ExportError(
            f"the checkpoint holds {unexpected[0]}, which its configuration does not describe ({len(unexpected)} tensors); "
            f"{_ADVICE}"
        )
    for name, shape in expected.items():
        if exported[name] != shape:
            raise ExportError(
                f"{name} has shape {list(exported[name])} in the checkpoint and {list(shape)} by its configuration; "
                f"{_ADVICE}"
            )


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(source)))


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _rules(model: ModelConfig) -> dict[str, dict[str, Part]]:
    ours, theirs = "decoder.layers.{layer}.", "model.layers.{layer}."

    def vocabulary(tensor: Tensor) -> Tensor:
        return tensor[: model.vocab_size]  # the rest pads the embedding to a multiple

    def projection(first: int, last: int | None) -> Part:
        """Rows of one projection; megatron stores, for each key/value head, its query heads, the key and the value."""
        heads = model.num_attention_heads // model.num_query_groups + 2

        def part(tensor: Tensor) -> Tensor:
            grouped = tensor.view(model.num_query_groups, heads, model.head_dim, tensor.shape[1])
            return grouped[:, first:last].reshape(-1, tensor.shape[1])

        return part

    rules: dict[str, dict[str, Part]] = {
        "embedding.word_embeddings.weight": {"model.embed_tokens.weight": vocabulary},
        "output_layer.weight": {"lm_head.weight": vocabulary},
        "decoder.final_layernorm.weight": {"model.norm.weight": _whole},
        f"{ours}self_attention.linear_qkv.weight": {
            f"{theirs}self_attn.q_proj.weight": projection(0, -2),
            f"{theirs}self_attn.k_proj.weight": projection(-2, -1),
            f"{theirs}self_attn.v_proj.weight": projection(-1, None),
        },
    }
    same_but_for_the_name = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
        **_swiglu("mlp."),
        **_swiglu("mlp.experts.{expert}."),
        **_swiglu("mlp.shared_experts."),
        "engram.conv.weight": "engram.conv_weight",
        **{
            f"engram.{name}.weight": f"engram.{name}.weight"
            for name in ("key_proj", "value_proj", "norm_key", "norm_query", "norm_conv")
        },
        "engram.table": "engram.table.weight",
        "bank.level{level}.table": "bank.level{level}.weight",
    }
    return rules | {ours + source: {theirs + name: _whole} for source, name in same_but_for_the_name.items()}


def _swiglu(module: str) -> dict[str, str]:
    names = {"linear_fc1.gate": "gate_proj", "linear_fc1.up": "up_proj", "linear_fc2": "down_proj"}
    return {f"{module}{source}.weight": f"{module}{name}.weight" for source, name in names.items()}
