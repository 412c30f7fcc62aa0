"""Opening a Hugging Face model for import: what it holds, and every reason to refuse it before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from megamem.errors import ConfigError, DataError, ExportError
from megamem.testing.pretrained import END, FAMILIES, VOCABULARY, config_of, write_pretrained
from megamem_checkpoints.hf.native.families import model_of
from megamem_checkpoints.hf.pretrained import Pretrained
from megamem_checkpoints.reader import CheckpointReader
from megamem_data.tokenizer import open_tokenizer
from megamem_launch.config import load_config
from megamem_launch.verbs import export, generate, import_


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_imported_run_holds_every_weight(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    write_pretrained(folder, family, dtype)
    assert (folder / "model.safetensors.index.json").exists()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    run = tmp_path / "runs" / "mine"
    assert import_.main([str(folder), str(run)]) == 0
    settings = load_config(run)
    assert settings.run_dir == run and settings.model == Pretrained.open(folder).model
    assert settings.train.precision == ("bf16" if dtype == torch.bfloat16 else "fp32")
    assert settings.data.tokenizer.model == str(run / "tokenizer" / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run / "tokenizer" / name).read_bytes() == (folder / name).read_bytes()
    reader = CheckpointReader(run / "checkpoints" / "step_00000000")
    reader.verify()
    assert reader.meta["eos_id"] == END and reader.step == 0
    theirs = weights(folder)
    taken = sum(tensor.numel() for tensor in theirs.values())
    embeddings = 1 if settings.model.untie_embeddings_and_output_weights else 0
    padding = (1 + embeddings) * (settings.model.padded_vocab_size - VOCABULARY) * 24
    assert sum(reader.tensor(name).numel() for name in reader.names()) == taken + padding
    embedding = reader.tensor("embedding.word_embeddings.weight")
    assert torch.equal(embedding[:VOCABULARY], theirs["model.embed_tokens.weight"].float())
    assert not embedding[VOCABULARY:].any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "runs"]
    assert [path.name for path in run.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_gives_back_every_byte(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, run, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    write_pretrained(folder, family, dtype)
    import_.main([str(folder), str(run)])
    assert export.main([str(run), str(out), "--to", "native", "--no-verify", "--max-shard-size", "30KB"]) == 0
    theirs, ours = weights(folder), weights(out)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype and torch.equal(ours[name], tensor), name
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, out))
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"_name_or_path", "head_dim"}, changed
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


GENERATION = {"do_sample": True, "eos_token_id": [END + 1, END + 2], "max_length": 99, "temperature": 0.6}


@pytest.mark.parametrize("target", ["native", "megamem"])
def test_an_export_is_the_same_model(target: str, tmp_path: Path) -> None:
    folder, run, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    ends = [END + 1, END]
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **scaling}
    changes: dict[str, Any] = {"rope_parameters": rope, "bos_token_id": 259, "eos_token_id": ends, "pad_token_id": None}
    write_pretrained(folder, "llama", max_position_embeddings=131072, **changes)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    assert import_.main([str(folder), str(run)]) == 0
    assert load_config(run).data.seq_length == 4096
    assert export.main([str(run), str(out), "--to", target]) == 0
    found = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (found["max_position_embeddings"], found["bos_token_id"]) == (131072, 259)
    assert found["eos_token_id"] == (ends if target == "native" else END)  # where n-grams stop is one token
    assert found["pad_token_id"] == (None if target == "native" else END)
    # The tokenizer's own end of documents, which the lists of the original may lack, is added.
    generation = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == GENERATION | {"eos_token_id": [*GENERATION["eos_token_id"], END]}
    assert json.loads((out / "export.json").read_text(encoding="utf-8"))["seq_length"] == 4096
    assert "add_special_tokens" not in (out / "README.md").read_text(encoding="utf-8")  # its training had them


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_tokenizer_of_llama_2_comes_and_goes(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    model = write_pretrained(folder, family, tokenizer="metaspace", bos_token_id=1, eos_token_id=2)
    (folder / "generation_config.json").unlink()
    assert import_.main([str(folder), str(run)]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run / "tokenizer" / name).read_bytes() == (folder / name).read_bytes()
    assert export.main([str(run), str(out), "--to", "native"]) == 0
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text(encoding="utf-8")) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tokenizer, prompt = AutoTokenizer.from_pretrained(out), "a  <s> b"
    ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True, return_tensors="pt").input_ids
    assert ids.tolist() == [open_tokenizer(folder).encode(prompt)]
    assert tokenizer(prompt).input_ids[0] == 1 not in ids
    capsys.readouterr()
    assert generate.main([str(out), prompt, "--max-new-tokens", "7"]) == 0
    expected = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=2)
    assert capsys.readouterr().out == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"


def test_a_tokenizer_that_cannot_leave_again_does_not_enter(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    write_pretrained(folder, "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["added_tokens_decoder"] = {"260": {"content": "quick"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ExportError, match="AutoTokenizer does not give the ids"):
        import_.main([str(folder), str(tmp_path / "run")])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_position_ids_tell_packed_documents_apart_as_the_card_says(family: str, tmp_path: Path) -> None:
    model = write_pretrained(tmp_path, family)
    one, two = torch.arange(7)[None] + 3, torch.arange(5)[None] + 90
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = model(torch.cat([one, two], dim=1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(ids, use_cache=False).logits for ids in (one, two)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [-5, 1])
def test_a_sequence_has_a_length(length: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--seq-length is {length}; set at least 2"):
        import_.main([str(tmp_path), str(tmp_path / "run"), "--seq-length", str(length)])


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is true"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'linear'",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 2.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            r"high_freq_factor is 2\.0, and Llama 3\.1's 4",
        ),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ("mixtral", {"sliding_window": 16}, r"sliding window \(sliding_window=16\)"),
        ("qwen3_moe", {"norm_topk_prob": False}, "num_experts_per_tok is 2 with norm_topk_prob=False"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    ],
)
def test_what_megamem_does_not_compute_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=f"this {family} model cannot be imported: .*{message}"):
        model_of(config_of(family, **changes))


def test_llama_3_scaling_is_a_setting() -> None:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **scaling}
    model = model_of(config_of("llama", rope_parameters=rope))
    assert (model.rotary_base, model.rope_scaling_factor) == (5e5, 32.0)


def test_damage_is_found_before_anything_is_written(tmp_path: Path) -> None:
    folder, run = tmp_path / "hf", tmp_path / "run"
    write_pretrained(folder, "llama")

    def refused(message: str, error: type[Exception] = ExportError) -> None:
        with pytest.raises(error, match=message):
            import_.main([str(folder), str(run)])
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    shard = sorted(folder.glob("*.safetensors"))[1]
    good = shard.read_bytes()
    shard.write_bytes(good[:-4])
    refused(f"{shard.name} is damaged")
    shard.unlink()
    refused(f"{shard.name} is missing")
    shard.write_bytes(good)
    tensors = load_file(shard)
    save_file({**tensors, "model.layers.0.mlp.gate_proj.bias": torch.zeros(32)}, shard)
    refused(r"holds model\.layers\.0\.mlp\.gate_proj\.bias, which its configuration does not describe")
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, shard)
    refused(f"gives no value for {name}".replace(".", r"\."))
    save_file({**tensors, name: tensors[name].to(torch.float64)}, shard)
    refused("is F64; take a checkpoint in fp32, bf16 or fp16")
    shard.write_bytes(good)
    index = folder / "model.safetensors.index.json"
    listing = index.read_text(encoding="utf-8")
    index.write_text(listing.replace(shard.name, f"../{shard.name}"), encoding="utf-8")
    refused("names files elsewhere")
    index.write_text(listing, encoding="utf-8")
    change_config(folder, quantization_config={"quant_method": "fp8"})
    refused("its weights are quantised")
    change_config(folder, quantization_config=None, hidden_size=28)
    refused("has shape")
    generation = folder / "generation_config.json"
    content = generation.read_text(encoding="utf-8")
    generation.write_text("[]", encoding="utf-8")
    change_config(folder, hidden_size=24)
    refused(r"generation_config\.json is damaged")
    generation.write_text(content, encoding="utf-8")
    change_config(folder, hidden_size="wide")
    refused(r"config\.json is no configuration of a llama model")
    change_config(folder, hidden_size=24, model_type="gpt2")
    refused("holds a gpt2 model; llama, qwen3, qwen3_moe, mixtral models can be imported")
    change_config(folder, model_type="llama")
    settings = folder / "tokenizer_config.json"
    settings.write_text("{}", encoding="utf-8")
    refused("says of no token that it ends a document", DataError)
    (folder / "tokenizer.json").unlink()
    refused(r"has no tokenizer\.json")


def test_pickles_and_taken_directories_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    config_of("llama").save_pretrained(folder)
    with pytest.raises(ExportError, match="download its safetensors files"):
        Pretrained.open(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ExportError, match="pickled weights are not opened"):
        Pretrained.open(folder)
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        import_.main([str(folder), str(run)])
    with pytest.raises(ExportError, match=r"nowhere/config\.json cannot be read"):
        Pretrained.open(tmp_path / "nowhere")


def test_what_follows_from_the_configuration_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    write_pretrained(folder, "llama")
    shard = sorted(folder.glob("*.safetensors"))[0]
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), "lm_head.weight": torch.ones(VOCABULARY, 24)}
    save_file(load_file(shard) | old, shard)
    assert import_.main([str(folder), str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "left out lm_head.weight: the output projection is tied to the embedding" in printed
    assert "left out model.layers.0.self_attn.rotary_emb.inv_freq" in printed
