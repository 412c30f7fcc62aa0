"""The ``model`` section: shape of the backbone. Words are megatron-core's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megamem.config import above_zero, at_least
from megamem.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    """``model.moe``: mixture-of-experts feed-forward layers. No layer listed means a dense model."""

    layers: list[int] = field(default_factory=list)
    """Zero-based layers whose feed-forward part is a mixture of experts."""
    num_experts: int = 8
    """Routed experts in each of these layers."""
    router_topk: int = 2
    """Experts that each token uses."""
    ffn_hidden_size: int = 512
    """Hidden units of one routed expert."""
    shared_expert_hidden_size: int = 0
    """Hidden units of the shared expert that every token uses; 0 for none."""
    router: Literal["softmax_aux_loss", "sigmoid_bias"] = "softmax_aux_loss"
    """``softmax_aux_loss``: softmax scores, load balanced by an auxiliary loss (Switch). ``sigmoid_bias``: sigmoid scores,
    balanced by a per-expert selection bias without any auxiliary loss (DeepSeek-V3)."""
    aux_loss_coeff: float = 1e-2
    """Weight of the auxiliary loss beside the mean loss of a token; used by ``softmax_aux_loss`` alone. It balances every
    micro-batch by itself and is averaged over them, so it asks for less the larger ``train.micro_batch_size`` is."""
    bias_update_rate: float = 1e-3
    """Step of the selection bias after each optimizer step; used by ``sigmoid_bias`` alone."""
    token_dispatcher: Literal["allgather", "alltoall"] = "allgather"
    """How tokens reach experts on other ranks."""

    def __post_init__(self) -> None:
        at_least(self, 0, "shared_expert_hidden_size", "aux_loss_coeff", "bias_update_rate")
        at_least(self, 1, "ffn_hidden_size")
        if len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"layers is {self.layers}; name each layer once")
        if self.layers and not 1 <= self.router_topk <= self.num_experts:
            raise ConfigError(f"router_topk is {self.router_topk}; set it between 1 and num_experts={self.num_experts}")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """``model``: a decoder of grouped-query attention with RoPE, RMSNorm and SwiGLU, no biases."""

    num_layers: int = 6
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    ffn_hidden_size: int = 704
    """Hidden units of the dense SwiGLU layers."""
    num_attention_heads: int = 8
    """Query heads."""
    num_query_groups: int = 4
    """Key/value heads; divides ``num_attention_heads``."""
    kv_channels: int = 0
    """Width of one attention head; 0 means ``hidden_size / num_attention_heads``."""
    vocab_size: int = 0
    """Entries of the tokenizer; 0 takes the number from the prepared data."""
    make_vocab_size_divisible_by: int = 128
    """The embedding has this multiple of rows, whatever the tensor-parallel size, so that checkpoints fit any layout."""
    rotary_base: float = 10000.0
    """Base of the RoPE frequencies."""
    rope_scaling_factor: float = 1.0
    """Slows the low RoPE frequencies by this factor, as Llama 3.1 and later do for contexts beyond 8192 tokens; 1 leaves them."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    layernorm_zero_centered_gamma: bool = True
    """RMSNorm scales by ``1 + weight`` and weights start at zero. False scales by ``weight``, which starts at one: the form of
    Llama, Qwen3 and Mixtral, whose weights ``1 + weight`` would round. Norms of memories are zero-centred either way."""
    qk_layernorm: bool = True
    """RMSNorm of every query and key head."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output projection weights of its own; by default it shares the embedding's."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights; output projections use it divided by sqrt(2 num_layers)."""
    attention_backend: Literal["auto", "sdpa", "flash"] = "auto"
    """``auto`` takes flash-attn where it is installed and a CUDA device is present, else torch's SDPA."""
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        at_least(self, 1, "make_vocab_size_divisible_by")
        at_least(self, 0, "vocab_size", "kv_channels", "init_method_std")
        at_least(self, 1, "rope_scaling_factor")
        above_zero(self, "rotary_base", "norm_epsilon")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}; set num_query_groups to one of its divisors"
            )
        if not self.kv_channels and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}; set kv_channels or another hidden_size"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"the attention heads are {self.head_dim} wide; RoPE needs an even width: set kv_channels"
            )
        bad = [i for i in self.moe.layers if not 0 <= i < self.num_layers]
        if bad:
            raise ConfigError(f"moe.layers names layer {bad[0]}; set layers from 0 to {self.num_layers - 1}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: ``vocab_size`` rounded up, independent of any parallel size."""
        unit = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // unit) * unit
