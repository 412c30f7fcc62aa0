"""Whether a model fits a layout: checks across sections, before anything is built. Needs no torch."""

from __future__ import annotations

from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.models.config import ModelConfig
from megamem.parallel.layout import Layout


def check_model(
    model: ModelConfig, memory: MemoryConfig, layout: Layout, *, seq_length: int, sequence_parallel: bool
) -> None:
    """Raise ConfigError for the first setting that does not fit; return where the model can be built.

    A vocabulary of 0 entries, not yet taken from the data, fits everything.
    """
    layout.stage_layers(model.num_layers, 0)
    _check_memory_layers(model, memory)
    _check_tensor_parallel(model, memory, layout, seq_length, sequence_parallel)
    _check_experts(model, layout, sequence_parallel)


def _check_memory_layers(model: ModelConfig, memory: MemoryConfig) -> None:
    for name, layers in (("memory.engram.layers", memory.engram.layers), ("memory.bank.layers", memory.bank.layers)):
        outside = [layer for layer in layers if not 0 <= layer < model.num_layers]
        if outside:
            raise ConfigError(
                f"{name} names layer {outside[0]}, which no pipeline stage holds; set layers from 0 to "
                f"{model.num_layers - 1} (model.num_layers={model.num_layers})"
            )


def _check_tensor_parallel(
    model: ModelConfig, memory: MemoryConfig, layout: Layout, seq_length: int, sequence_parallel: bool
) -> None:
    tp = f"parallel.tensor_model_parallel_size={layout.tp}"
    groups, vocab = model.num_query_groups, model.padded_vocab_size
    if groups % layout.tp and layout.tp % groups:
        raise ConfigError(
            f"model.num_query_groups={groups} is neither a multiple nor a divisor of {tp}; set one to fit the other"
        )
    if vocab % layout.tp:
        raise ConfigError(
            f"the padded vocabulary has {vocab} rows, not a multiple of {tp}; "
            "set model.make_vocab_size_divisible_by to one"
        )
    projected = (model.num_attention_heads + 2 * groups) * model.head_dim
    split = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    if model.moe.layers:
        split["model.moe.shared_expert_hidden_size"] = model.moe.shared_expert_hidden_size
    for name, size in split.items():
        if size % layout.tp:
            raise ConfigError(f"{name}={size} is not a multiple of {tp}; set one to fit the other")
    if projected % layout.tp:
        raise ConfigError(
            f"queries, keys and values are {projected} wide together, not a multiple of {tp}; set model.kv_channels to one"
        )
    sliced = sequence_parallel or memory.engram.layers or memory.bank.enabled
    cuts = layout.slices if sliced else layout.cp
    if seq_length % cuts:
        context = f"parallel.context_parallel_size={layout.cp}"
        over = context if cuts == layout.cp else tp if layout.cp == 1 else f"{context} x {tp}"
        raise ConfigError(
            f"the sequence length {seq_length} is not a multiple of {over}, over which it is split; "
            "set one to fit the other"
        )


def _check_experts(model: ModelConfig, layout: Layout, sequence_parallel: bool) -> None:
    ep = f"parallel.expert_model_parallel_size={layout.ep}"
    if not model.moe.layers:
        if layout.ep > 1:
            raise ConfigError(f"{ep}, but model.moe.layers names no layer; set {ep.partition('=')[0]} to 1")
        if layout.etp != layout.tp:
            raise ConfigError(
                f"parallel.expert_tensor_parallel_size={layout.etp}, but model.moe.layers names no layer; set it to 0"
            )
        return
    if model.moe.ffn_hidden_size % layout.etp:
        setting = "tensor_model_parallel_size" if layout.etp == layout.tp else "expert_tensor_parallel_size"
        raise ConfigError(
            f"model.moe.ffn_hidden_size={model.moe.ffn_hidden_size} is not a multiple of parallel.{setting}={layout.etp}; "
            "set one to fit the other"
        )
    if model.moe.num_experts % layout.ep:
        raise ConfigError(
            f"model.moe.num_experts={model.moe.num_experts} is not a multiple of {ep}; set one to fit the other"
        )
    if layout.tp > 1 and not sequence_parallel:
        raise ConfigError(
            "model.moe.layers under tensor parallelism needs parallel.sequence_parallel; set it to true, or "
            "parallel.tensor_model_parallel_size to 1"
        )
