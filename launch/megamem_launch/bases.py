"""Named bases: complete starting points that a YAML file refers to with ``base: NAME`` and changes by a few lines."""

from __future__ import annotations

import copy
from typing import Any

from megamem.config import merge

BASES: dict[str, dict[str, Any]] = {
    # Seconds per run on one core: for tests and for looking around.
    "tiny": {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "moe": {"layers": [2], "num_experts": 4, "router_topk": 2, "ffn_hidden_size": 64},
        },
        "memory": {
            "engram": {"layers": [1], "heads": 2, "width": 8, "rows_per_head": 1009},
            "bank": {"units": [8, 4], "branching": 4},
        },
        "data": {"seq_length": 64, "tokenizer": {"vocab_size": 1024}},
        "train": {"steps": 20, "global_batch_size": 4, "micro_batch_size": 1},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "checkpoint": {"interval": 10},
    },
    # The shape of the quickstart: a few million backbone parameters, all kinds of memory.
    "quickstart": {
        "model": {
            "num_layers": 6,
            "hidden_size": 192,
            "ffn_hidden_size": 512,
            "num_attention_heads": 6,
            "num_query_groups": 2,
            "moe": {
                "layers": [3, 5],
                "num_experts": 8,
                "router_topk": 2,
                "ffn_hidden_size": 256,
                "shared_expert_hidden_size": 256,
            },
        },
        "memory": {
            "engram": {"layers": [1, 4], "orders": [2, 3], "heads": 4, "width": 24, "rows_per_head": 50_000},
            "bank": {"layers": [2, 3, 4, 5], "units": [32, 16], "branching": 8},
            # One process whose OpenMP threads take every core has none to spare for a thread that fetches ahead: each of its
            # moments makes all of them wait. On two cores steps took 13 % longer.
            "prefetch_depth": 0,
        },
        "data": {"seq_length": 256, "validation_fraction": 0.03, "tokenizer": {"vocab_size": 8192}},
        "train": {
            "steps": 400,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "eval_batches": 8,
            "eval_interval": 80,
            "log_interval": 10,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 20, "schedule": "wsd"},
        "checkpoint": {"interval": 80},
    },
    # Backbone and memories of the Engram paper's 27B model (arXiv 2601.07372, table 5), with grouped-query attention in
    # place of its latent attention and one residual stream in place of four.
    "engram_27b": {
        "model": {
            "num_layers": 30,
            "hidden_size": 2560,
            "ffn_hidden_size": 10_240,
            "num_attention_heads": 32,
            "num_query_groups": 8,
            "kv_channels": 128,
            "vocab_size": 129_280,
            "untie_embeddings_and_output_weights": True,
            "moe": {
                "layers": list(range(1, 30)),
                "num_experts": 55,
                "router_topk": 6,
                "ffn_hidden_size": 1536,
                "shared_expert_hidden_size": 3072,
                "router": "sigmoid_bias",
                "token_dispatcher": "alltoall",
            },
        },
        "memory": {
            "engram": {
                "layers": [1, 14],
                "orders": [2, 3],
                "heads": 8,
                "width": 80,
                "rows_per_head": 2_262_400,
                "fold_tokens": True,
            },
        },
        "data": {"seq_length": 4096, "tokenizer": {"vocab_size": 129_280}},
        "train": {"steps": 50_000, "global_batch_size": 1280, "precision": "bf16", "eval_interval": 1000},
        "optimizer": {"lr": 4e-4, "warmup_steps": 2000},
        "checkpoint": {"interval": 1000, "keep": 3},
    },
    # Anchor and bank of "Pretraining with hierarchical memories" (arXiv 2510.02375, section 4), 410M row.
    "hierarchical_410m": {
        "model": {
            "num_layers": 24,
            "hidden_size": 1024,
            "ffn_hidden_size": 2816,
            "num_attention_heads": 16,
            "num_query_groups": 16,
            "rotary_base": 100_000.0,
            "vocab_size": 50_432,
            "untie_embeddings_and_output_weights": True,
        },
        "memory": {"bank": {"units": [512, 128, 32], "branching": 16}},
        "data": {"seq_length": 2048, "tokenizer": {"vocab_size": 50_432}},
        "train": {"steps": 500_000, "global_batch_size": 1024, "precision": "bf16", "eval_interval": 5000},
        "optimizer": {"lr": 1e-3, "min_lr_ratio": 0.01, "warmup_steps": 10_000, "weight_decay": 0.1},
        "checkpoint": {"interval": 2000, "keep": 3},
    },
    # The native family: models that can be exported as transformers' own Qwen4-Exp (docs/huggingface.md), with one
    # feed-forward shape in all layers, raw token ids hashed and no bank. Each Engram costs a layer of zeros there, hence one
    # Engram where size matters: in the second layer, the best place for a single one (arXiv 2601.07372).
    "native_tiny": {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "moe": {"layers": [0, 1, 2, 3], "num_experts": 4, "router_topk": 2, "ffn_hidden_size": 64},
        },
        "memory": {"engram": {"layers": [1, 3], "heads": 2, "width": 8, "rows_per_head": 1009}},
        "data": {"seq_length": 64, "tokenizer": {"vocab_size": 1024}},
        "train": {"steps": 20, "global_batch_size": 4, "micro_batch_size": 1},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "checkpoint": {"interval": 10},
    },
    # 1.4B parameters and a table of 2.9B.
    "native_dense": {
        "model": {
            "num_layers": 24,
            "hidden_size": 2048,
            "ffn_hidden_size": 5632,
            "num_attention_heads": 16,
            "num_query_groups": 8,
            "vocab_size": 65_536,
            "untie_embeddings_and_output_weights": True,
        },
        "memory": {"engram": {"layers": [1], "orders": [2, 3], "heads": 8, "width": 80, "rows_per_head": 2_262_400}},
        "data": {"seq_length": 4096, "tokenizer": {"vocab_size": 65_536}},
        "train": {"steps": 50_000, "global_batch_size": 512, "precision": "bf16", "eval_interval": 1000},
        "optimizer": {"lr": 4e-4, "warmup_steps": 2000},
        "checkpoint": {"interval": 1000, "keep": 3},
    },
    # 6.9B parameters, of which a token uses 1.3B, and the same table.
    "native_moe": {
        "model": {
            "num_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_query_groups": 8,
            "vocab_size": 65_536,
            "untie_embeddings_and_output_weights": True,
            "moe": {
                "layers": list(range(16)),
                "num_experts": 64,
                "router_topk": 8,
                "ffn_hidden_size": 1024,
                "token_dispatcher": "alltoall",
            },
        },
        "memory": {"engram": {"layers": [1], "orders": [2, 3], "heads": 8, "width": 80, "rows_per_head": 2_262_400}},
        "data": {"seq_length": 4096, "tokenizer": {"vocab_size": 65_536}},
        "train": {"steps": 50_000, "global_batch_size": 1024, "precision": "bf16", "eval_interval": 1000},
        "optimizer": {"lr": 4e-4, "warmup_steps": 2000},
        "checkpoint": {"interval": 1000, "keep": 3},
    },
}

# The Engram paper's 40B model: the backbone of its 27B one, and 3.2 times the rows.
BASES["engram_40b"] = merge(copy.deepcopy(BASES["engram_27b"]), {"memory": {"engram": {"rows_per_head": 7_239_680}}})
