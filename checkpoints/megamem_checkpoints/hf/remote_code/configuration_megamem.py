"""Configuration of a megamem model: a grouped-query decoder with optional experts, Engram tables and memory banks."""
# ruff: noqa: RUF012 (a class attribute that transformers reads)

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig


class MegamemConfig(PreTrainedConfig):
    r"""
    Shape of a [`MegamemForCausalLM`]. Layers are counted from zero.

    Args:
        moe_layers (`list[int]`): layers whose feed-forward part is a mixture of experts.
        moe_router (`str`): `softmax` (experts chosen and weighted by softmax score) or `sigmoid_bias` (chosen by
            sigmoid score plus a bias, weighted by the score alone). The weights of a token are normalised to sum 1.
        shared_expert_intermediate_size (`int`): hidden units of the expert that every token uses; 0 for none.
        engram_layers (`list[int]`): layers with an Engram module (arXiv 2601.07372), which reads hashed n-grams.
        engram_orders, engram_heads, engram_width: n-gram orders, hash heads of each order, width of one row.
        engram_multipliers (`list[list[str]]`): for each Engram layer the odd multipliers of look-back 0, 1, ..., as
            decimal strings because JSON readers round large numbers.
        engram_primes (`list[list[int]]`): for each Engram layer the rows of every head, order by order.
        engram_pad_id (`int`): token id that stands for missing left context.
        engram_fold_tokens (`bool`): hash `model.token_fold[id]` in place of `id`.
        engram_sqrt_gate (`bool`): signed square root before the gate's sigmoid.
        engram_conv_kernel_size (`int`): taps of the causal convolution, dilated by the highest order; 0 for none.
        bank_layers (`list[int]`): layers with a memory bank (arXiv 2510.02375).
        bank_units (`list[int]`): hidden units of one block at each level, root first; 0 skips a level.
        bank_branching (`int`): level `l` (from 1) has `bank_branching ** l` blocks and one generic block, the last.
        router_dimensions (`int`): width of the embeddings that route a prompt to blocks; 0 when no router is stored.
        zero_centered_norms (`bool`): norms scale by `1 + weight` in place of `weight`; those of memories always do.
        table_placement (`str`): where memory tables are. `device`: with the rest of the model, as parameters (buffers in
            fp8, which torch cannot train). `cpu` and `disk`: in host memory, or mapped from the weight files and read row
            by row; these stay behind whatever device the rest is on, are no parameters, and are read only.
        table_shards (`int`): ranges of rows that each table is cut into, if it has as many rows.
        engram_table_dtype, bank_table_dtype (`str`): `float32`, `bfloat16` or `float8_e4m3fn` (with one power-of-two
            scale per 32 values) of stored rows, whatever the dtype of the rest.
    """

    model_type = "megamem"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 64
    intermediate_size: int = 176
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    qk_layernorm: bool = True
    zero_centered_norms: bool = True
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int = 0

    moe_layers: list[int] | None = None
    moe_router: Literal["softmax", "sigmoid_bias"] = "softmax"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0

    engram_layers: list[int] | None = None
    engram_orders: list[int] | None = None
    engram_heads: int = 0
    engram_width: int = 0
    engram_multipliers: list[list[str]] | None = None
    engram_primes: list[list[int]] | None = None
    engram_pad_id: int = 0
    engram_fold_tokens: bool = False
    engram_sqrt_gate: bool = True
    engram_conv_kernel_size: int = 0

    bank_layers: list[int] | None = None
    bank_units: list[int] | None = None
    bank_branching: int = 16
    router_dimensions: int = 0

    table_placement: Literal["device", "cpu", "disk"] = "device"
    table_shards: int = 1
    engram_table_dtype: Literal["float32", "bfloat16", "float8_e4m3fn"] = "float32"
    bank_table_dtype: Literal["float32", "bfloat16", "float8_e4m3fn"] = "float32"

    layer_types: list[str] | None = None
    number_of_conv_states: int = 1

    def __post_init__(self, **kwargs):
        for name in ("moe_layers", "engram_layers", "engram_orders", "engram_multipliers", "engram_primes"):
            setattr(self, name, getattr(self, name) or [])
        self.bank_layers = self.bank_layers or []
        self.bank_units = self.bank_units or []
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        # An Engram layer keeps its last tokens, and the tail of its convolution, beside keys and values.
        engram = set(self.engram_layers)
        self.layer_types = ["hybrid" if i in engram else "full_attention" for i in range(self.num_hidden_layers)]
        self.number_of_conv_states = 2 if self.engram_conv_kernel_size > 1 else 1
        super().__post_init__(**kwargs)


__all__ = ["MegamemConfig"]
