"""Which configurations fit Qwen4-Exp: the presets do, and every setting that spoils one is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megamem_checkpoints.hf.native.qwen4_exp_conditions import conditions
from megamem_launch.config import load_config

PRESETS = sorted((Path(__file__).parents[3] / "configs").glob("native_*.yaml"))

VIOLATIONS = {
    "model.qk_layernorm=false": "model.qk_layernorm is false; .* to be true",
    "model.layernorm_zero_centered_gamma=false": "model.layernorm_zero_centered_gamma is false; .* to be true",
    "model.hidden_size=60": "model.hidden_size is 60; .* a multiple of 8",
    "model.ffn_hidden_size=44": "model.ffn_hidden_size is 44; .* a multiple of 8",
    "model.moe.ffn_hidden_size=44": "model.moe.ffn_hidden_size is 44; .* a multiple of 8",
    "model.moe.layers=[1, 2, 3]": "model.moe.layers leaves out layer 0; .* to name all of them, or none",
    "model.moe.router=sigmoid_bias": "model.moe.router is sigmoid_bias; .* to be softmax_aux_loss",
    "memory.engram.layers=[]": "memory.engram.layers names no layer; .* --to native",
    "memory.engram.layers=[3, 1]": r"memory.engram.layers is \[3, 1\]; .* to be \[1, 3\]",
    "memory.engram.fold_tokens=true": "memory.engram.fold_tokens is true; .* to be false",
    "memory.engram.pad_id=7": "memory.engram.pad_id is 7; .* to be -1",
    "memory.engram.sqrt_gate=false": "memory.engram.sqrt_gate is false; .* to be true",
    "memory.bank.units=[8]": r"memory.bank.units is \[8\]; .* to be empty",
}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_fit_and_each_changed_setting_is_named(path: Path) -> None:
    config = load_config(path)
    assert conditions(config.model, config.memory) == []
    assert conditions(config.model, config.memory, eos_id=3) == []
    for change, sentence in VIOLATIONS.items():
        if change.startswith("model.ffn" if config.model.moe.layers else "model.moe."):
            continue
        changed = load_config(path, ["model.kv_channels=16", change])
        found = conditions(changed.model, changed.memory, eos_id=3)
        assert len(found) == 1 and re.fullmatch(sentence, found[0]), (change, found)


def test_a_pad_token_that_ends_documents_is_fine() -> None:
    config = load_config(PRESETS[0], ["memory.engram.pad_id=3"])
    assert conditions(config.model, config.memory, eos_id=3) == []
    assert len(conditions(config.model, config.memory)) == 1  # which token ends documents is not known
