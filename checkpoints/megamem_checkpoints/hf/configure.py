"""The configuration of an exported model, from the configuration of its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megamem.config.base import build
from megamem.memory.config import MemoryConfig
from megamem.memory.folding import folded_vocab_size
from megamem.memory.hashing import hash_specs
from megamem.models.config import ModelConfig
from megamem_checkpoints.hf.inherited import context_length, special_tokens
from megamem_checkpoints.hf.remote_code.configuration_megamem import MegamemConfig


def hf_config(
    meta: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    fold: np.ndarray | None = None,
    router_dimensions: int = 0,
    **tables: Any,
) -> MegamemConfig:
    """The configuration of the exported model.

    Args:
        meta: Of the checkpoint.
        dtype: Of the exported parameters.
        fold: ``[vocab_size]`` int64, required where tokens are folded before hashing.
        router_dimensions: Width of the prompt router's embeddings, 0 for no router.
        tables: Settings of :class:`MegamemConfig` on how tables are stored.
    """
    model = build(ModelConfig, meta["config"]["model"])
    memory = build(MemoryConfig, meta["config"]["memory"])
    engram, bank, moe = memory.engram, memory.bank, model.moe
    vocab_size, eos_id = model.vocab_size, int(meta["eos_id"])
    specs = hash_specs(engram, vocab_size if fold is None else folded_vocab_size(fold))
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "qk_layernorm": model.qk_layernorm,
        "max_position_embeddings": context_length(meta),
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope_parameters(model),
        "zero_centered_norms": model.layernorm_zero_centered_gamma,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": special_tokens(meta)["bos_token_id"],
        "eos_token_id": eos_id,  # the one that n-grams stop at; others that end a text are in generation_config.json
        "pad_token_id": eos_id,
        "dtype": dtype,
        **tables,
    }
    if moe.layers:
        settings |= {
            "moe_layers": sorted(moe.layers),
            "moe_router": "sigmoid_bias" if moe.router == "sigmoid_bias" else "softmax",
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.router_topk,
            "moe_intermediate_size": moe.ffn_hidden_size,
            "shared_expert_intermediate_size": moe.shared_expert_hidden_size,
        }
    if engram.layers:
        settings |= {
            "engram_layers": list(engram.layers),
            "engram_orders": list(engram.orders),
            "engram_heads": engram.heads,
            "engram_width": engram.width,
            "engram_multipliers": [[str(m) for m in specs[layer].multipliers] for layer in engram.layers],
            "engram_primes": [specs[layer].primes.ravel().tolist() for layer in engram.layers],
            "engram_pad_id": eos_id if engram.pad_id == -1 else engram.pad_id,
            "engram_fold_tokens": engram.fold_tokens,
            "engram_sqrt_gate": engram.sqrt_gate,
            "engram_conv_kernel_size": engram.conv_kernel_size,
        }
    if bank.enabled:
        settings |= {
            "bank_layers": sorted(bank.layers) or list(range(model.num_layers)),
            "bank_units": list(bank.units),
            "bank_branching": bank.branching,
            "router_dimensions": router_dimensions,
        }
    modelling = "modeling_megamem.MegamemForCausalLM"
    return MegamemConfig(
        architectures=["MegamemForCausalLM"],
        auto_map={"AutoConfig": "configuration_megamem.MegamemConfig", "AutoModelForCausalLM": modelling},
        **settings,
    )


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """RoPE as transformers describes it. megatron-core fixes the other numbers of the scaling to those of Llama 3.1."""
    if model.rope_scaling_factor == 1:
        return {"rope_type": "default", "rope_theta": model.rotary_base}
    return {
        "rope_type": "llama3",
        "rope_theta": model.rotary_base,
        "factor": model.rope_scaling_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
