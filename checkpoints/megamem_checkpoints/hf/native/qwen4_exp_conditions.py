"""Which models fit transformers' own Qwen4-Exp architecture exactly. Needs no torch."""

from __future__ import annotations

from megamem.memory.config import EngramConfig, MemoryConfig
from megamem.models.config import ModelConfig

_EXPERT_UNIT = 8
"""bf16 values that the grouped matrix multiplication of experts, transformers' default, wants weights to be aligned to."""


def conditions(model: ModelConfig, memory: MemoryConfig, *, eos_id: int | None = None) -> list[str]:
    """What keeps a model from being a ``Qwen4ExpForCausalLM``: one sentence per setting; none where it fits.

    All of them have to be met before training. ``eos_id`` is the end-of-document token, for a configuration whose data is
    prepared.
    """
    return [*_backbone(model), *_experts(model), *_engram(memory.engram, eos_id), *_bank(memory)]


def _backbone(model: ModelConfig) -> list[str]:
    found = []
    if not model.qk_layernorm:
        found.append(
            "model.qk_layernorm is false; Qwen4-Exp normalises every query and key head: it would have to be true"
        )
    if not model.layernorm_zero_centered_gamma:
        found.append(
            "model.layernorm_zero_centered_gamma is false; Qwen4-Exp scales by 1 + weight, and bf16 cannot hold the scales "
            "of other norms in that form: it would have to be true"
        )
    widths = {"hidden_size": model.hidden_size} | (
        {"moe.ffn_hidden_size": model.moe.ffn_hidden_size}
        if model.moe.layers
        else {"ffn_hidden_size": model.ffn_hidden_size}
    )
    for name, width in widths.items():
        if width % _EXPERT_UNIT:
            found.append(
                f"model.{name} is {width}; transformers multiplies experts whose rows are multiples of 16 bytes: it would have "
                f"to be a multiple of {_EXPERT_UNIT}"
            )
    return found


def _experts(model: ModelConfig) -> list[str]:
    found = []
    if model.moe.layers and len(model.moe.layers) < model.num_layers:
        dense = min(set(range(model.num_layers)) - set(model.moe.layers))
        found.append(
            f"model.moe.layers leaves out layer {dense}; Qwen4-Exp has one feed-forward shape in all layers: it would have to "
            "name all of them, or none"
        )
    if model.moe.layers and model.moe.router != "softmax_aux_loss":
        found.append(
            f"model.moe.router is {model.moe.router}; Qwen4-Exp chooses experts by softmax without a bias: it would have to "
            "be softmax_aux_loss"
        )
    return found


def _engram(engram: EngramConfig, eos_id: int | None) -> list[str]:
    if not engram.layers:
        return ["memory.engram.layers names no layer; a model without Engram has simpler forms: export it --to native"]
    found = []
    if engram.layers != sorted(engram.layers):
        found.append(
            f"memory.engram.layers is {engram.layers}; Qwen4-Exp gives the smallest primes to the first layers: it would have "
            f"to be {sorted(engram.layers)}"
        )
    if engram.fold_tokens:
        found.append("memory.engram.fold_tokens is true; Qwen4-Exp hashes raw token ids: it would have to be false")
    if engram.pad_id not in (-1, eos_id):
        found.append(
            f"memory.engram.pad_id is {engram.pad_id}; in Qwen4-Exp the end-of-document token stands for missing context: it "
            "would have to be -1"
        )
    if not engram.sqrt_gate:
        found.append(
            "memory.engram.sqrt_gate is false; Qwen4-Exp takes the signed square root of the score: it would have to be true"
        )
    return found


def _bank(memory: MemoryConfig) -> list[str]:
    if not memory.bank.enabled:
        return []
    return [
        f"memory.bank.units is {memory.bank.units}; Qwen4-Exp has no blocks fetched by document: it would have to be empty"
    ]
