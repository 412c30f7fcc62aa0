"""Names of streams and tables. Light: the command line uses them before anything heavy is imported."""

from __future__ import annotations

from megamem.memory.config import MemoryConfig
from megamem.models.config import ModelConfig


def engram_stream_name(layer: int) -> str:
    """Stream of one Engram layer (zero-based)."""
    return f"decoder.layers.{layer}.engram"


def engram_table_name(layer: int) -> str:
    """Table of one Engram layer: ``[rows, width]``."""
    return f"{engram_stream_name(layer)}.table"


def bank_stream_name(level: int) -> str:
    """Stream of one bank level (counted from 1)."""
    return f"bank.level{level}"


def bank_table_name(layer: int, level: int) -> str:
    """Table of one bank level in one layer: ``[branching ** level + 1, 3 * units * hidden_size]``."""
    return f"decoder.layers.{layer}.bank.level{level}.table"


def table_names(model: ModelConfig, memory: MemoryConfig) -> list[str]:
    """Names of all tables of a model, whichever stage has them."""
    bank_layers = memory.bank.layers or range(model.num_layers)
    levels = [level for level, units in enumerate(memory.bank.units, start=1) if units]
    return [
        *(engram_table_name(layer) for layer in memory.engram.layers),
        *(bank_table_name(layer, level) for layer in bank_layers for level in levels),
    ]
