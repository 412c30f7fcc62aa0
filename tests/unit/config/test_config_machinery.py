"""Strict construction, merging and overrides of configuration trees."""

from __future__ import annotations

import pytest

from megamem.config import build, merge, parse_override, to_dict
from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.models.config import ModelConfig
from megamem.train.config import OptimizerConfig


def test_plain_data_round_trip() -> None:
    config = build(MemoryConfig, {"engram": {"layers": [1, 4], "width": 16}, "optimizer": {"betas": [0.9, 0.99]}})
    assert config.engram.layers == [1, 4]
    assert config.optimizer.betas == (0.9, 0.99)
    assert build(MemoryConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"engram": {"widht": 3}}, r"unknown setting `memory\.engram\.widht`: did you mean `width`\?"),
        ({"engran": {}}, r"unknown setting `memory\.engran`: did you mean `engram`\?"),
        ({"engram": {"width": "wide"}}, r"memory\.engram\.width must be a whole number, not 'wide' \(str\)"),
        ({"engram": {"width": 1.5}}, r"memory\.engram\.width must be a whole number"),
        ({"engram": {"width": True}}, r"memory\.engram\.width must be a whole number"),
        ({"engram": {"layers": 3}}, r"memory\.engram\.layers must be a list"),
        ({"engram": {"layers": ["a"]}}, r"memory\.engram\.layers\[0\] must be a whole number"),
        ({"engram": 7}, r"memory\.engram must be a mapping"),
        ({"optimizer": {"name": "lazy_adm"}}, r"memory\.optimizer\.name .*did you mean `lazy_adam`\?"),
        ({"engram": {"orders": [2, 4]}}, r"memory\.engram: orders is \[2, 4\]; set consecutive orders"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"memory\.optimizer: betas"),
    ],
)
def test_bad_settings_are_named(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(MemoryConfig, data, "memory")


def test_numbers_convert_only_where_nothing_is_lost() -> None:
    assert build(OptimizerConfig, {"lr": 1, "warmup_steps": 3.0}).warmup_steps == 3
    assert build(OptimizerConfig, {"lr": "1e-4"}).lr == 1e-4
    with pytest.raises(ConfigError, match="warmup_steps must be a whole number"):
        build(OptimizerConfig, {"warmup_steps": 3.5})


def test_merge_reaches_into_sections_and_replaces_lists() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merge(base, {"a.b": 2, "a": {"c": [9]}, "e.f": 5}) == {"a": {"b": 2, "c": [9]}, "d": 4, "e": {"f": 5}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_overrides_are_yaml() -> None:
    assert parse_override("a.b=[1, 2]") == {"a": {"b": [1, 2]}}
    assert parse_override("a=") == {"a": None}
    for bad in ("a.b", "=3", "a=[1"):
        with pytest.raises(ConfigError, match="override"):
            parse_override(bad)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"num_attention_heads": 8, "num_query_groups": 3}, "num_query_groups"),
        ({"hidden_size": 100, "num_attention_heads": 8}, "kv_channels"),
        ({"num_layers": 2, "moe": {"layers": [2]}}, "moe.layers names layer 2"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_model_shapes_are_checked(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ModelConfig, data, "model")


def test_padded_vocabulary() -> None:
    assert ModelConfig(vocab_size=1000).padded_vocab_size == 1024
    assert ModelConfig(vocab_size=1024).padded_vocab_size == 1024
