"""The configuration of a run: files, bases, overrides, cross checks, and every file in configs/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamem.config import to_dict
from megamem.errors import ConfigError
from megamem_launch.config import load_config, save_config
from megamem_launch.validate import validate

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
VPP2 = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]


def smallest_world(config) -> int:
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.expert_model_parallel_size
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_configuration_loads_validates_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    validate(config, smallest_world(config))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path) == config


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_configuration_builds_on_the_meta_device(path: Path) -> None:
    from megamem.models.gpt import build_model
    from megamem.parallel import groups as parallel_groups
    from megamem.parallel.layout import Layout

    config = load_config(path)
    config.model.vocab_size = config.model.vocab_size or config.data.tokenizer.vocab_size
    parallel_groups.init_distributed()
    try:
        groups = parallel_groups.initialize(Layout(), seed=1)
        model = build_model(
            config.model,
            config.memory,
            groups=groups,
            seq_length=config.data.seq_length,
            dtype=torch.float32,
            seed=1,
            sequence_parallel=False,
            device=torch.device("meta"),
        )
        assert all(p.device.type == "meta" for p in model.parameters())
        embedding = config.model.padded_vocab_size * config.model.hidden_size
        assert sum(p.numel() for p in model.parameters()) > embedding
    finally:
        parallel_groups.destroy()
        dist.destroy_process_group()


def test_precedence_base_file_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny\nmodel: {num_layers: 6}\nmemory.engram.width: 12\n")
    config = load_config(file, ["model.num_layers=8", "train.steps=7"])
    assert (config.model.num_layers, config.memory.engram.width, config.train.steps) == (8, 12, 7)
    assert config.model.hidden_size == load_config(None, ["base=tiny"]).model.hidden_size == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory: {engram: {widht: 3}}", r"mine\.yaml: unknown setting `memory\.engram\.widht`: did you mean `width`"),
        ("model: [1\n", r"mine\.yaml:\d+ is not valid YAML"),
        ("name: a\nname: b\n", r"mine\.yaml:2 .*`name` is given twice"),
        ("- 1\n", "must hold sections"),
        ("base: tinny\n", "base is 'tinny'; set one of: .*tiny"),
        ("name: a/b\n", "plain directory name"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.tensor_model_parallel_size=2"], 3, "a world of 3 ranks does not fit .*multiple of 2"),
        (
            ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "model.ffn_hidden_size=101"],
            2,
            "model.ffn_hidden_size=101 is not a multiple",
        ),
        (["parallel.tensor_model_parallel_size=2"], 2, "needs parallel.sequence_parallel; set it to true"),
        (["parallel.pipeline_model_parallel_size=3"], 3, "num_layers=4 is not a multiple"),
        ([*VPP2, "train.global_batch_size=3"], 2, "makes 3 micro-batches .* set it to a multiple of 2"),
        ([*VPP2, "model.num_layers=6"], 2, "stage 0 has 3 of .*virtual_pipeline_model_parallel_size=2"),
        (["parallel.expert_tensor_parallel_size=2", "model.moe.layers=[]"], 2, "expert_tensor_parallel_size=2, but"),
        (["parallel.expert_model_parallel_size=2"], 1, "expert_model_parallel_size=2 does not divide"),
        (["parallel.expert_model_parallel_size=2", "model.moe.layers=[]"], 2, "model.moe.layers names no layer"),
        (["model.moe.num_experts=3", "parallel.expert_model_parallel_size=2"], 2, "model.moe.num_experts=3"),
        (["train.global_batch_size=3"], 2, "multiple of 2"),
        (["memory.engram.layers=[4]"], 1, "memory.engram.layers names layer 4, which no pipeline stage holds"),
        (["memory.bank.layers=[9]"], 1, "memory.bank.layers names layer 9"),
        (["memory.bank.units=[]", "memory.bank.layers=[1]"], 1, "memory.bank.units is empty"),
        (["optimizer.warmup_steps=20"], 1, "leaves nothing of train.steps"),
        (["optimizer.schedule=wsd", "optimizer.decay_steps=19"], 1, "exceed train.steps"),
        (["data.validation_fraction=0"], 1, "data.validation_fraction is 0"),
    ],
)
def test_sections_must_fit_each_other(overrides: list[str], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load_config(None, ["base=tiny", *overrides]), world)


def test_to_dict_is_plain_data() -> None:
    import json

    data = to_dict(load_config(None, ["base=quickstart"]))
    assert json.loads(json.dumps(data)) == data


def test_on_and_off_are_words_although_yaml_reads_them_as_booleans() -> None:
    config = load_config(None, ["memory.verify=off", "memory.hierarchical=on", "memory.optimizer.clip=off"])
    assert (config.memory.verify, config.memory.hierarchical, config.memory.optimizer.clip) == ("off", "on", "off")


def test_storage_of_a_table_is_that_of_all_where_its_entry_says_nothing() -> None:
    config = load_config(None, ["memory.storage.format=bf16", "memory.tables=[{match: '*.bank.*', tier: disk}]"])
    own, other = config.memory.storage_of("decoder.layers.1.bank.level1.table"), config.memory.storage_of("x")
    assert (own.tier, own.tier_of_state, own.format) == ("disk", "disk", "bf16")
    assert (other.tier, other.format) == ("host", "bf16")
