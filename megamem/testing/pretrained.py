"""Tiny random models as transformers saves them, with a tokenizer: what an import reads, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 262
"""Entries of the models; those of the tokenizer are two fewer."""
END = 257
"""Token that ends a document."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 10},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""What tells the models apart."""


def config_of(family: str, **changes: Any) -> Any:
    """The configuration of a model of two layers."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,  # as transformers' grouped products want it
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "eos_token_id": END,
    }
    return AutoConfig.for_model(family, **common | FAMILIES[family] | changes)


def write_pretrained(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: Literal["bytes", "metaspace"] = "bytes",
    **changes: Any,
) -> Any:
    """Save a random model, in several files, and its tokenizer; returns it. ``changes`` are settings of its configuration."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
    model.save_pretrained(folder, max_shard_size="20KB")
    write_tokenizer(folder, tokenizer)
    return model.eval()


def write_tokenizer(folder: Path, kind: Literal["bytes", "metaspace"] = "bytes") -> None:
    """``bytes``: bytes, and four special tokens after them. ``metaspace``: what Llama 2, TinyLlama and Mixtral ship, whose class
    builds another tokenizer than ``tokenizer.json`` describes; it puts a token in front of texts, and token 2 ends them."""
    if kind == "metaspace":
        _write_metaspace(folder)
        return
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: token for token, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|end|>", "<|user|>", "<|begin|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _write_metaspace(folder: Path) -> None:
    special = ["<unk>", "<s>", "</s>"]
    entries = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁"]
    vocabulary = {entry: token for token, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "▁")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(entry, special=True, normalized=False) for entry in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
