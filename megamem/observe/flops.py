"""Floating-point operations of the model by formula. Needs no torch.

One multiplication with its addition counts as two operations. Per token, with ``h`` the hidden size, ``q = heads * d`` and
``k = groups * d`` the widths of queries and keys, ``s`` the sequence length, forward::

    attention   2h(q + 2k) + 2qh    projections of queries, keys, values and output
                2q(s + 1)           scores and their product with values: the causal half of 4qs
    mlp         6hf                 SwiGLU of f hidden units, each dense layer
    moe         2hE                 router over E experts
                6hf top_k + 6hf'    the experts that a token uses, and the shared one
    engram      4eh                 key and value of e = orders * heads * width concatenated row elements
                2h + 2th            gate's inner product, convolution of t taps
    bank        6hu                 blocks of u hidden units in all levels
    logits      2hv                 v rows of the padded embedding, last stage

Backward takes twice as much, once for the gradients of activations and once for those of weights (Kaplan et al. 2020, arXiv
2001.08361, section 2.1): training takes three times forward. Look-ups, norms, RoPE, softmax and activation functions count
nothing, as in Megatron's and PaLM's formulas (arXiv 2204.02311, appendix B). Documents packed into one sequence count as one
document: shorter ones need less, so utilisation is overstated where the kernel skips them. What recompute does again is
no model FLOP, and :func:`recompute_flops` tells it apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megamem.memory.config import MemoryConfig
from megamem.models.config import ModelConfig
from megamem.train.config import Recompute

BACKWARD = 2
"""Operations of backward as a multiple of forward's."""


def forward_flops(
    model: ModelConfig,
    memory: MemoryConfig,
    seq_length: int,
    *,
    layers: Iterable[int] | None = None,
    logits: bool = True,
    causal: bool = True,
) -> dict[str, float]:
    """Operations of one token's forward pass, by part: ``attention``, ``mlp``, ``moe``, ``engram``, ``bank``, ``logits``.

    Args:
        model: The backbone; its ``vocab_size`` must be filled in.
        memory: The memories.
        seq_length: Tokens of a sequence.
        layers: Zero-based, of a pipeline stage; None for all.
        logits: Whether the stage computes the loss.
        causal: Count what causality needs. False counts every key of the sequence for every query, as kernels that mask do
            and as :class:`torch.utils.flop_counter.FlopCounterMode` counts.
    """
    total: Counter[str] = Counter()
    for layer in range(model.num_layers) if layers is None else layers:
        total.update(layer_flops(model, memory, seq_length, layer, causal=causal))
    if logits:
        total["logits"] += 2 * model.hidden_size * model.padded_vocab_size
    return {part: float(count) for part, count in total.items() if count}


def layer_flops(
    model: ModelConfig, memory: MemoryConfig, seq_length: int, layer: int, *, causal: bool = True
) -> dict[str, float]:
    """As :func:`forward_flops`, of one layer."""
    h, moe = model.hidden_size, model.moe
    q, k = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    parts: dict[str, float] = {"attention": 2 * h * (q + 2 * k) + 2 * q * h + core_flops(model, seq_length, causal)}
    if layer in moe.layers:
        used = moe.router_topk * moe.ffn_hidden_size + moe.shared_expert_hidden_size
        parts["moe"] = 2 * h * moe.num_experts + 6 * h * used
    else:
        parts["mlp"] = 6 * h * model.ffn_hidden_size
    if layer in memory.engram.layers:
        engram = memory.engram
        columns = len(engram.orders) * engram.heads * engram.width
        parts["engram"] = 4 * columns * h + 2 * h + 2 * engram.conv_kernel_size * h
    if memory.bank.enabled and (not memory.bank.layers or layer in memory.bank.layers):
        parts["bank"] = 6 * h * sum(memory.bank.units)
    return parts


def core_flops(model: ModelConfig, seq_length: int, causal: bool = True) -> float:
    """Operations of one token in the core attention of one layer, averaged over its position."""
    keys = (seq_length + 1) / 2 if causal else seq_length
    return 4 * model.num_attention_heads * model.head_dim * keys


def training_flops(model: ModelConfig, memory: MemoryConfig, seq_length: int) -> float:
    """Model FLOPs of one token, forward and backward: what model FLOP utilisation (MFU) is made of."""
    return (1 + BACKWARD) * sum(forward_flops(model, memory, seq_length).values())


def recompute_flops(model: ModelConfig, memory: MemoryConfig, seq_length: int, recompute: Recompute) -> float:
    """Operations of one token that backward does a second time: nothing; the core attention and memories (``selective``);
    the forward pass of every layer (``full``)."""
    if recompute == "none":
        return 0.0
    parts = forward_flops(model, memory, seq_length, logits=False)
    if recompute == "full":
        return sum(parts.values())
    return core_flops(model, seq_length) * model.num_layers + parts.get("engram", 0.0) + parts.get("bank", 0.0)
