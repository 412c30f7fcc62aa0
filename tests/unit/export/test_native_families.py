"""Which models are stock models, and a bank merged along one path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamem.config import build
from megamem.errors import ExportError
from megamem.memory.config import BankConfig, MemoryConfig
from megamem.models.config import ModelConfig
from megamem_checkpoints.hf.export import check_plan
from megamem_checkpoints.hf.native.families import conditions, family_of
from megamem_checkpoints.hf.native.memory_free import _notes, plan
from megamem_checkpoints.hf.native.merge import block_rows
from megamem_checkpoints.hf.source import Source
from megamem_checkpoints.hf.write import write_weights

HIDDEN, FFN = 12, 10


class StandIn:
    """A checkpoint of random tensors in memory."""

    step = 3

    def __init__(self, model: dict[str, Any], memory: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dense = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        bank = build(MemoryConfig, memory).bank
        sizes = {level: (3**level + 1, 3 * units * HIDDEN) for level, units in enumerate(bank.units, start=1) if units}
        self.stored = {
            f"decoder.layers.{layer}.bank.level{level}.table": torch.randn(size, generator=generator)
            for layer in bank.layers
            for level, size in sizes.items()
        }
        config = {"model": model, "memory": memory, "data": {"seq_length": 16}}
        self.meta = {"config": config, "precision": "fp32", "eos_id": 1}

    def names(self) -> list[str]:
        return sorted(self.dense)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.dense[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self.dense[name]

    def tables(self) -> dict[str, tuple[int, int]]:
        return {name: (table.shape[0], table.shape[1]) for name, table in self.stored.items()}

    def format(self, table: str) -> Any:
        return "fp32"

    def stored_rows(self, table: str, start: int, stop: int) -> dict[str, Tensor]:
        return {"rows": self.stored[table][start:stop]}

    def verify(self) -> None:
        return None


def source(dtype: str = "fp32", **memory: Any) -> Source:
    model = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "vocab_size": 20,
        "make_vocab_size_divisible_by": 8,
    }
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": (4 * 6, HIDDEN),
        "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
        "self_attention.q_layernorm.weight": (6,),
        "self_attention.k_layernorm.weight": (6,),
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "mlp.linear_fc1.gate.weight": (FFN, HIDDEN),
        "mlp.linear_fc1.up.weight": (FFN, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, FFN),
    }
    shapes = {f"decoder.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"embedding.word_embeddings.weight": (24, HIDDEN), "decoder.final_layernorm.weight": (HIDDEN,)}
    reader = StandIn(model, memory, shapes)
    return Source.open(reader, tokenizer=Path(), clusters=Path(), dtype=dtype)  # type: ignore[arg-type]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_merged_blocks_add_what_the_bank_adds() -> None:
    bank = {"units": [3, 0, 2], "branching": 3, "layers": [1]}
    origin = source(bank=bank)
    found = plan(origin, merge_path="2,7,21")
    check_plan(found, origin)
    assert (found.model_type, found.config.intermediate_size) == ("qwen3", FFN + 5)
    assert set(found.dropped) == set(origin.tables()) and "2,7,21" in found.notes[0]
    tensors = {tensor.name: next(tensor.pieces()) for tensor in found.tensors}
    assert all(tuple(tensors[t.name].shape) == t.shape for t in found.tensors)
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(5))
    for layer in range(2):
        ours = [
            origin.tensor(f"decoder.layers.{layer}.mlp.linear_{name}.weight") for name in ("fc1.gate", "fc1.up", "fc2")
        ]
        expected = swiglu(x, *ours)
        for level, row in ((1, 2), (3, 21)) if layer == 1 else ():
            block = origin.reader.stored_rows(f"decoder.layers.1.bank.level{level}.table", row, row + 1)["rows"]
            first, second, output = block.view(3, -1, HIDDEN)
            expected = expected + swiglu(x, first, second, output.T)
        theirs = [tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        assert theirs[2].shape == (HIDDEN, FFN + 5)
        torch.testing.assert_close(swiglu(x, *theirs), expected, rtol=1e-5, atol=1e-5)


def test_norms_in_bf16_come_with_a_warning() -> None:
    assert plan(source()).notes == ()
    (note,) = plan(source("bf16")).notes
    assert "--dtype fp32" in note and "qwen3" in note


@pytest.mark.parametrize(("qk_layernorm", "family"), [(True, "qwen3_moe"), (False, "mixtral")])
def test_routers_in_bf16_come_with_a_warning(qk_layernorm: bool, family: str) -> None:
    origin = source("bf16")
    origin.model.qk_layernorm, origin.model.layernorm_zero_centered_gamma = qk_layernorm, False
    origin.model.moe.layers = [0, 1]
    (note,) = _notes(origin, family, "")
    assert note.startswith(f"In bf16 a {family} model rounds the scores of experts")
    assert not list(_notes(replace(origin, dtype=torch.float32), family, ""))


def test_every_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, read = source(), []
    monkeypatch.setattr(
        type(origin.reader), "tensor", lambda reader, name: read.append(name) or reader.dense[name], raising=True
    )
    write_weights(tmp_path, plan(origin).tensors, "5GB")
    assert sorted(read) == origin.reader.names()


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        ({"engram": {"layers": [0]}}, {}, r"memory\.engram\.layers is \[0\]"),
        ({"bank": {"units": [3], "branching": 3, "layers": [1]}}, {}, "--merge-path, such as generic or 0"),
        ({}, {"merge_path": "0"}, "the model has no bank to merge"),
        ({}, {"family": "llama"}, r"no llama model: model\.qk_layernorm is true and would have to be false"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    memory: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        plan(source(**memory), **options)


def test_a_bank_on_experts_cannot_be_merged() -> None:
    origin = source(bank={"units": [3], "branching": 3, "layers": [1]})
    origin.model.moe.layers = [1]
    with pytest.raises(ExportError, match="the bank widens layer 1, a mixture of experts"):
        plan(origin, merge_path="generic")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("1", "one cluster for each of the bank's 2 levels, such as 0,0"),
        ("1,x", "is '1,x'; set generic"),
        ("-1,0", "set generic"),
        ("3,9", "has cluster 3 at level 1; set one from 0 to 2"),
        ("1,6", "cluster 6 at level 2, which is no child of cluster 1; set one from 3 to 5"),
    ],
)
def test_a_path_is_one_of_the_tree(path: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        block_rows(path, BankConfig(units=[4, 2], branching=3))


def test_paths_name_rows() -> None:
    bank = BankConfig(units=[4, 2], branching=3)
    assert block_rows("1, 4", bank) == {1: 1, 2: 4}
    assert block_rows("generic", bank) == {1: 3, 2: 9}


def test_every_condition_is_named_at_once() -> None:
    model = ModelConfig(num_layers=3, qk_layernorm=False)
    model.moe.layers, model.moe.router_topk = [0, 2], 1
    model.moe.router, model.moe.shared_expert_hidden_size = "sigmoid_bias", 8
    assert family_of(model) == "mixtral"
    found = " ".join(conditions("mixtral", model))
    for name in ("layers would have to name every layer", "router_topk is 1", "router is sigmoid_bias", "size is 8"):
        assert name in found
    assert len(conditions("qwen3", model)) == 4
