"""The configuration of a ``Qwen4ExpForCausalLM`` that computes what a megamem model computes."""

from __future__ import annotations

import torch
from transformers import Qwen4ExpTextConfig

from megamem.memory.config import EngramConfig, MemoryConfig
from megamem.models.config import ModelConfig
from megamem_checkpoints.hf.native.families import rope_parameters

STREAMS = 2
"""Residual streams: the fewest that the architecture takes. Both carry the same numbers."""
_CONV_TAPS = 4
"""Taps of the released model's convolution."""
_NULL_WIDTH = 16
"""Of modules whose weights are all zero and which cannot be left out."""
_LINEAR_HEAD = 128
"""Width of a head of linear attention: the released one, for which kernels exist."""
_COMPRESSION = 4
"""Keys per block of the sparse attention's index, as released."""
_BUDGETS = (2048, 8192)
"""Keys that sparse attention may read, as serving engines support them."""


def carriers(layers: list[int]) -> dict[int, int]:
    """Layer of the exported model that carries the Engram of each of ``layers``: a null layer right before its own."""
    return {layer: layer + place for place, layer in enumerate(sorted(layers))}


def layer_places(num_layers: int, engram_layers: list[int]) -> list[int]:
    """Place of each of our layers in the exported model, behind the carriers inserted up to it."""
    return [layer + sum(owner <= layer for owner in engram_layers) for layer in range(num_layers)]


def conv_taps(engram: EngramConfig) -> int:
    """Taps of the exported convolution: a shorter one gets zeros in front, as many as the released model has."""
    return max(engram.conv_kernel_size, _CONV_TAPS)


def qwen4_exp_config(
    model: ModelConfig,
    memory: MemoryConfig,
    *,
    eos_id: int,
    seq_length: int,
    dtype: torch.dtype,
    table_shards: int,
) -> Qwen4ExpTextConfig:
    """The configuration, for a model that violates no condition and whose vocabulary is known.

    ``rows_per_head`` makes transformers derive the primes of :func:`~megamem.memory.hashing.hash_specs`, hence tables with
    as many rows; its multipliers are others, and ours travel as buffers.
    """
    engram, moe = memory.engram, model.moe
    carried = carriers(engram.layers)
    num_layers = model.num_layers + len(carried)
    budget = next(
        (budget for budget in _BUDGETS if budget >= seq_length), -(-seq_length // _COMPRESSION) * _COMPRESSION
    )
    third = model.head_dim // 2 // 3
    return Qwen4ExpTextConfig(
        architectures=["Qwen4ExpForCausalLM"],
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=num_layers,
        layer_types=[
            "linear_attention" if layer in carried.values() else "indexed_attention" for layer in range(num_layers)
        ],
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        max_position_embeddings=seq_length,
        initializer_range=model.init_method_std,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=rope_parameters(model)
        | {
            "partial_rotary_factor": 1.0,
            # Positions of text are the same in all three sections.
            "mrope_section": [model.head_dim // 2 - 2 * third, third, third],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=False,  # the output projection is doubled
        num_experts=moe.num_experts if moe.layers else 1,
        num_experts_per_tok=moe.router_topk if moe.layers else 1,
        norm_topk_prob=bool(moe.layers) and moe.router_topk > 1,
        moe_intermediate_size=moe.ffn_hidden_size if moe.layers else model.ffn_hidden_size,
        shared_expert_intermediate_size=(moe.shared_expert_hidden_size if moe.layers else 0) or _NULL_WIDTH,
        linear_num_key_heads=model.num_query_groups,
        linear_num_value_heads=model.num_query_groups,
        linear_key_head_dim=_LINEAR_HEAD,
        linear_value_head_dim=_LINEAR_HEAD,
        hc_count=STREAMS,
        hc_lowrank=_NULL_WIDTH,
        ple_layer_ids=[layer + 1 for layer in carried.values()],
        ple_embed_dim=len(engram.orders) * engram.heads * engram.width,
        ple_conv_kernel_size=conv_taps(engram),
        ngram_size=max(engram.orders),
        heads_per_ngram=engram.heads,
        ngram_vocab_size_base=engram.rows_per_head,
        make_ngram_vocab_size_divisible_by=table_shards,
        split_ngram_parts=table_shards,
        indexer_n_heads=1,
        indexer_kv_heads=1,
        indexer_head_dim=model.head_dim,
        indexer_budget=budget,
        indexer_compress_ratio=_COMPRESSION,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        dtype=dtype,
    )
