"""Checks across sections, made before anything heavy is imported or any process group exists."""

from __future__ import annotations

from fnmatch import fnmatchcase

from megamem.errors import ConfigError
from megamem.memory.names import table_names
from megamem.memory.placement import MAX_ROWS
from megamem.models.checks import check_model
from megamem.parallel.checks import check_zero
from megamem.parallel.layout import Layout
from megamem_launch.config import RunConfig


def validate(config: RunConfig, world_size: int) -> Layout:
    """Check that the sections fit each other on ``world_size`` ranks; ConfigError says what to set. Returns the layout."""
    layout = Layout.from_config(config.parallel, world_size)
    check_model(
        config.model,
        config.memory,
        layout,
        seq_length=config.data.seq_length,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    check_zero(config.optimizer, layout)
    _check_batch(config, layout)
    _check_memory(config)
    _check_schedule(config)
    return layout


def _check_batch(config: RunConfig, layout: Layout) -> None:
    train = config.train
    unit = train.micro_batch_size * layout.dp
    if train.global_batch_size % unit:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {layout.dp} data-parallel ranks; set it to a multiple of {unit}"
        )
    if layout.vpp > 1 and train.global_batch_size % (unit * layout.pp):
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} makes {train.global_batch_size // unit} micro-batches on each "
            f"data-parallel rank, not a multiple of parallel.pipeline_model_parallel_size={layout.pp}, as interleaved stages "
            f"(parallel.virtual_pipeline_model_parallel_size={layout.vpp}) take them in rounds; set it to a multiple of "
            f"{unit * layout.pp}"
        )


def _check_memory(config: RunConfig) -> None:
    memory = config.memory
    if memory.bank.layers and not memory.bank.enabled:
        raise ConfigError(
            "memory.bank.layers is set but memory.bank.units is empty; set the hidden units of each level"
        )
    vocab = config.model.vocab_size
    if memory.engram.layers and vocab and memory.engram.pad_id >= vocab:
        raise ConfigError(f"memory.engram.pad_id={memory.engram.pad_id} is not a token; set -1 or less than {vocab}")
    if memory.bank.enabled and memory.bank.branching**memory.bank.levels >= MAX_ROWS:
        raise ConfigError(
            f"memory.bank.branching ** levels exceeds the {MAX_ROWS} rows that a table may have; set fewer levels or children"
        )
    tables = table_names(config.model, memory)
    for entry in memory.tables:
        if not any(fnmatchcase(table, entry.match) for table in tables):
            raise ConfigError(
                f"memory.tables has match={entry.match}, which fits none of the tables {', '.join(tables) or '(none)'}; "
                "set a name or pattern of these"
            )


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
    trained = not config.data.path and not config.data.tokenizer.model
    if trained and config.model.vocab_size and config.model.vocab_size < config.data.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than data.tokenizer.vocab_size="
            f"{config.data.tokenizer.vocab_size}; set model.vocab_size=0 to take it from the data"
        )
