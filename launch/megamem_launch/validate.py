"""Checks across sections, made before anything heavy is imported or any process group exists."""

from __future__ import annotations

from collections.abc import Iterable

from megamem.errors import ConfigError
from megamem.parallel.layout import Layout, stage_layers
from megamem_launch.config import RunConfig


def validate(config: RunConfig, world_size: int) -> Layout:
    """Check that the sections fit each other on ``world_size`` ranks; ConfigError says what to set. Returns the layout."""
    layout = Layout.from_config(config.parallel, world_size)
    _check_tensor_parallel(config, layout)
    stage_layers(config.model.num_layers, layout.pp, 0)
    _check_experts(config, layout)
    _check_batch(config, layout)
    _check_memory(config)
    _check_schedule(config)
    return layout


def _divides(size: int, parts: int, name: str, parts_name: str) -> None:
    if size % parts:
        raise ConfigError(f"{name}={size} is not a multiple of {parts_name}={parts}; change one of them")


def _check_tensor_parallel(config: RunConfig, layout: Layout) -> None:
    tp, model = layout.tp, config.model
    if tp == 1:
        return
    name = "parallel.tensor_model_parallel_size"
    sizes = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "data.seq_length": config.data.seq_length,
    }
    if model.moe.layers:
        sizes["model.moe.ffn_hidden_size"] = model.moe.ffn_hidden_size
        sizes["model.moe.shared_expert_hidden_size"] = model.moe.shared_expert_hidden_size
    for setting, size in sizes.items():
        _divides(size, tp, setting, name)


def _check_experts(config: RunConfig, layout: Layout) -> None:
    moe = config.model.moe
    if not moe.layers:
        if layout.ep > 1:
            raise ConfigError(
                f"parallel.expert_model_parallel_size={layout.ep} but model.moe.layers is empty; "
                "name the layers that have experts, or set it to 1"
            )
        return
    _divides(moe.num_experts, layout.ep, "model.moe.num_experts", "parallel.expert_model_parallel_size")
    if layout.tp > 1 and not config.parallel.sequence_parallel:
        raise ConfigError(
            "mixture-of-experts layers under tensor parallelism need sequence parallelism; "
            "set parallel.sequence_parallel=true"
        )


def _check_batch(config: RunConfig, layout: Layout) -> None:
    train = config.train
    unit = train.micro_batch_size * layout.dp
    if train.global_batch_size % unit:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {layout.dp} data-parallel ranks; set it to a multiple of {unit}"
        )


def _check_layers(layers: Iterable[int], num_layers: int, setting: str) -> None:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"{setting} names layer {layer}, which no pipeline stage holds; "
                f"set layers from 0 to {num_layers - 1} (model.num_layers={num_layers})"
            )


def _check_memory(config: RunConfig) -> None:
    memory, num_layers = config.memory, config.model.num_layers
    _check_layers(memory.engram.layers, num_layers, "memory.engram.layers")
    _check_layers(memory.bank.layers, num_layers, "memory.bank.layers")
    if memory.bank.layers and not memory.bank.enabled:
        raise ConfigError(
            "memory.bank.layers is set but memory.bank.units is empty; set the hidden units of each level"
        )
    vocab = config.model.vocab_size
    if memory.engram.layers and vocab and memory.engram.pad_id >= vocab:
        raise ConfigError(f"memory.engram.pad_id={memory.engram.pad_id} is not a token; set -1 or less than {vocab}")
    if memory.bank.enabled and memory.bank.branching**memory.bank.levels >= 2**62:
        raise ConfigError("memory.bank.branching ** levels exceeds 64-bit row ids; set fewer levels or children")


def _check_schedule(config: RunConfig) -> None:
    optimizer, train = config.optimizer, config.train
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= train.steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves nothing of train.steps={train.steps}; lower it"
        )
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_steps > train.steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} + optimizer.decay_steps={optimizer.decay_steps} exceed "
            f"train.steps={train.steps}; lower one of them"
        )
    if train.eval_batches and config.data.validation_fraction == 0:
        raise ConfigError("train.eval_batches asks for evaluation but data.validation_fraction is 0; set one of them")
    if config.model.vocab_size and config.model.vocab_size < config.data.tokenizer.vocab_size and not config.data.path:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than data.tokenizer.vocab_size="
            f"{config.data.tokenizer.vocab_size}; set model.vocab_size=0 to take it from the data"
        )
