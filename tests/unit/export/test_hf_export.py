"""Whole exports of a stand-in checkpoint: every kind of layer, offline reload, refusals."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from megamem.config.base import to_dict
from megamem.errors import CheckpointError, ConfigError, ExportError
from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.memory.folding import fold_from_sentencepiece
from megamem.models.config import ModelConfig, MoEConfig
from megamem_checkpoints.hf.configure import hf_config
from megamem_checkpoints.hf.export import check_plan, export_checkpoint
from megamem_checkpoints.hf.mapping import check_complete, map_names
from megamem_checkpoints.hf.remote_code.modeling_megamem import MegamemForCausalLM
from megamem_checkpoints.hf.source import Source
from megamem_checkpoints.hf.targets import plan_export
from megamem_checkpoints.hf.verify import check_files
from megamem_kernels.formats import FormatName, row_fields
from megamem_kernels.rounding import quantize_rows
from megamem_kernels.row_gather import dequantize_rows
from megamem_launch.verbs import export as export_verb
from megamem_launch.verbs import generate as generate_verb

VOCAB = 400


@cache
def tokenizer_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(json.__file__).read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


class StandIn:
    """A checkpoint in memory: canonical tensors made from a Hugging Face model of random weights."""

    def __init__(
        self, folder: Path, *, tied: bool = True, sigmoid: bool = False, formats: dict[str, FormatName] | None = None
    ) -> None:
        """``formats``: how the tables of ``engram`` and ``bank`` are stored where that is not fp32."""
        folder.mkdir()
        self.formats = formats or {}
        (folder / "tokenizer.model").write_bytes(tokenizer_model())
        generator = torch.Generator().manual_seed(5)
        clusters = {"idf": torch.rand(VOCAB, generator=generator), "components": torch.randn(4, VOCAB)}
        clusters |= {
            f"level{i + 1}.centroids": torch.randn(3**i, 3, 4, generator=generator) for i in range(3)
        }  # deeper than the bank
        digest = hashlib.sha256(tokenizer_model()).hexdigest()
        save_file(clusters, folder / "clusters.safetensors", {"encoder": "", "tokenizer_sha256": digest})
        router = "sigmoid_bias" if sigmoid else "softmax_aux_loss"
        model = ModelConfig(
            num_layers=3,
            hidden_size=24,
            ffn_hidden_size=40,
            num_attention_heads=6,
            num_query_groups=2,
            vocab_size=VOCAB,
            untie_embeddings_and_output_weights=not tied,
            moe=MoEConfig(layers=[2], num_experts=3, ffn_hidden_size=10, shared_expert_hidden_size=7, router=router),
        )
        memory = MemoryConfig(
            engram=EngramConfig(layers=[1], heads=2, width=3, rows_per_head=50, fold_tokens=True),
            bank=BankConfig(units=[4, 2], branching=3, layers=[0, 2]),
        )
        self.step = 7
        self.verified = False
        self.meta: dict[str, Any] = {
            "precision": "fp32",
            "config": {
                "name": "stand-in",
                "model": to_dict(model),
                "memory": to_dict(memory),
                "data": {"path": str(folder), "seq_length": 64, "sources": [{"kind": "python_stdlib", "path": ""}]},
                "train": {"precision": "auto", "steps": 9, "global_batch_size": 8},
                "optimizer": {"lr": 1e-3, "schedule": "cosine"},
            },
            "eos_id": 1,
            "tokenizer_sha256": digest,
            "tokens_seen": 3584,
            "final_losses": {"last": 5.25},
        }
        fold = fold_from_sentencepiece(folder / "tokenizer.model")
        self.model = MegamemForCausalLM(hf_config(self.meta, fold=fold, router_dimensions=4)).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=0.3, generator=generator)
            self.model.model.token_fold.copy_(torch.from_numpy(fold))
            del clusters["level3.centroids"]
            for name, tensor in clusters.items():
                self.model.memory_router.get_buffer(name.replace(".", "_")).copy_(tensor)
            if sigmoid:
                self.model.model.layers[2].mlp.gate.e_score_correction_bias.normal_(generator=generator)
        self.dense, self.memory_tables = canonical(self.model)

    def names(self) -> list[str]:
        return sorted(self.dense)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.dense[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self.dense[name].clone()

    def tables(self) -> dict[str, tuple[int, int]]:
        return {name: tuple(table.shape) for name, table in self.memory_tables.items()}

    def format(self, table: str) -> FormatName:
        return self.formats.get(table.split(".")[3], "fp32")

    def stored_rows(self, table: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        rows = self.memory_tables[table][start:stop]
        fields = {field.name: field.allocate(len(rows)) for field in row_fields(self.format(table), rows.shape[1])}
        quantize_rows(rows.contiguous(), fields)
        return fields

    def verify(self) -> None:
        self.verified = True


def canonical(model: MegamemForCausalLM) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The trainer's tensors of a Hugging Face model, written out by hand."""
    ours = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    dense: dict[str, torch.Tensor] = {}
    tables: dict[str, torch.Tensor] = {}
    padding = torch.full((512 - VOCAB, 24), 99.0)
    dense["embedding.word_embeddings.weight"] = torch.cat([ours["model.embed_tokens.weight"], padding])
    if not model.config.tie_word_embeddings:
        dense["output_layer.weight"] = torch.cat([ours["lm_head.weight"], padding])
    dense["decoder.final_layernorm.weight"] = ours["model.norm.weight"]
    for layer in range(3):
        here, there = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, v = (ours[f"{here}self_attn.{name}_proj.weight"] for name in "qkv")
        dense[f"{there}self_attention.linear_qkv.weight"] = torch.cat(
            [t for group in range(2) for t in (q[12 * group :][:12], k[4 * group :][:4], v[4 * group :][:4])]
        )
        names = {
            "input_layernorm": "input_layernorm",
            "self_attn.o_proj": "self_attention.linear_proj",
            "self_attn.q_norm": "self_attention.q_layernorm",
            "self_attn.k_norm": "self_attention.k_layernorm",
            "post_attention_layernorm": "pre_mlp_layernorm",
            "mlp.gate_proj": "mlp.linear_fc1.gate",
            "mlp.up_proj": "mlp.linear_fc1.up",
            "mlp.down_proj": "mlp.linear_fc2",
            "mlp.gate": "mlp.router",
        }
        for name, tensor in ours.items():
            stem = name.removeprefix(here).removesuffix(".weight")
            if not name.startswith(here) or stem.endswith(("q_proj", "k_proj", "v_proj")):
                continue
            if stem.endswith(".shard_0"):
                stem = stem.removesuffix(".shard_0")
                tables[f"{there}{stem}" + (".table" if "bank" in stem else "")] = tensor
            elif stem == "mlp.gate.e_score_correction_bias":
                dense[f"{there}mlp.router.expert_bias"] = tensor
            elif stem == "engram.conv_weight":
                dense[f"{there}engram.conv.weight"] = tensor
            elif stem in names:
                dense[f"{there}{names[stem]}.weight"] = tensor
            else:
                for theirs in ("gate_proj", "up_proj", "down_proj"):
                    stem = stem.replace(theirs, names[f"mlp.{theirs}"].removeprefix("mlp."))
                dense[f"{there}{stem}.weight"] = tensor
    return dense, tables


def sample_ids() -> torch.Tensor:
    ids = torch.randint(2, VOCAB, (2, 30), generator=torch.Generator().manual_seed(2))
    ids[1, 11] = 1
    return ids


RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from megamem_launch.verbs.generate import main
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = load_file(sys.argv[2])["ids"]
with torch.no_grad():
    routed = model.route(ids)
    save_file({"logits": model(ids, memory_paths=routed).logits, "routed": routed}, sys.argv[3])
model.save_pretrained(sys.argv[4])  # with the code
again = AutoModelForCausalLM.from_pretrained(sys.argv[4], trust_remote_code=True, table_placement="disk")
with torch.no_grad():
    assert torch.equal(again(ids).logits, model(ids).logits)
main([sys.argv[1], "def f(x):", "--max-new-tokens", "5", "--tables", "device"])
main([sys.argv[1], "def f(x):", "--max-new-tokens", "5", "--temperature", "1.0", "--seed", "1", "--generic"])
"""


@torch.no_grad()
def test_reloaded_export_has_the_logits_of_the_source(tmp_path: Path) -> None:
    source, out = StandIn(tmp_path / "data"), tmp_path / "out"
    report = export_checkpoint(source, out, origin="runs/x", max_shard_size="20KB", sample=["some text"])
    assert source.verified
    assert report["checks"]["greedy_cached_equal"]
    assert report["checks"]["cached_logits_relative_difference"] < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]

    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 1
    assert report == json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert {*report["files"], "export.json"} == {path.name for path in out.iterdir()}
    assert report["parameters"] == sum(parameter.numel() for parameter in source.model.parameters())

    save_file({"ids": sample_ids()}, tmp_path / "ids")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", RELOAD, str(out), *(str(tmp_path / name) for name in ("ids", "logits", "saved"))]
    texts = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert texts.count("def f(x):") == 2 and len(texts) > 2 * len("def f(x):\n")
    found = load_file(tmp_path / "logits")
    routed = source.model.route(sample_ids())
    expected = source.model(sample_ids(), memory_paths=routed).logits
    assert torch.equal(found["routed"], routed)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(source.model(sample_ids()).logits, expected, atol=1e-3)


@torch.no_grad()
def test_untied_output_and_selection_biases_survive(tmp_path: Path) -> None:
    source, out = StandIn(tmp_path / "data", tied=False, sigmoid=True), tmp_path / "out"
    report = export_checkpoint(source, out, verify=False)
    assert not source.verified and (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    biases = 3  # buffers, but learned
    assert report["parameters"] == biases + sum(parameter.numel() for parameter in source.model.parameters())
    model = MegamemForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model(sample_ids()).logits, source.model(sample_ids()).logits, rtol=1e-5, atol=1e-5)


def test_bf16_keeps_choices_in_fp32_and_the_card_tells_what_it_is(tmp_path: Path) -> None:
    source, out = StandIn(tmp_path / "data", sigmoid=True), tmp_path / "out"
    report = export_checkpoint(source, out, dtype="bf16", license="apache-2.0", verify=False)
    assert report["dtype"] == "bfloat16"
    model = MegamemForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight, source.model.model.embed_tokens.weight.bfloat16())
    bias = model.model.layers[2].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, source.model.model.layers[2].mlp.gate.e_score_correction_bias)
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (
        "license: apache-2.0",
        "use_cache=False",
        "add_special_tokens=False",
        "# stand-in",
        "3,584",
        "5.2500",
        "7 of 9",
        "model.route",
        "python_stdlib",
    ):
        assert text in card


@pytest.mark.parametrize("files", [None, 3])
@torch.no_grad()
def test_tables_keep_the_bits_of_the_run_in_any_number_of_files(files: int | None, tmp_path: Path) -> None:
    source, out = StandIn(tmp_path / "data", formats={"engram": "fp8", "bank": "bf16"}), tmp_path / "out"
    report = export_checkpoint(source, out, options={"table_files": files}, verify=False)
    index = out / "model.safetensors.index.json"
    assert index.exists() == (files is not None)
    if files:
        holders: dict[str, set[str]] = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            holders.setdefault(file, set()).add(name)
        tables = [names for names in holders.values() if any(".shard_" in name for name in names)]
        assert len(tables) == files and len(holders) == files + 1
        for number, names in enumerate(tables):
            assert all(f".shard_{number}." in name for name in names)
    tensors = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    for table, (rows, _) in source.tables().items():
        stored = source.stored_rows(table, 0, rows)
        stem = table.replace("decoder.", "model.") if "engram" in table else table.replace("decoder.", "model.")[:-6]
        for field, name in (("rows", "weight"), ("scales", "scale")):
            if field in stored:
                parts = [tensors[f"{stem}.shard_{i}.{name}"] for i in range(files or 1)]
                assert parts[0].dtype == stored[field].dtype
                assert torch.equal(torch.cat([p.view(torch.uint8) for p in parts]), stored[field].view(torch.uint8))
    values = sum(rows * width for rows, width in source.tables().values())
    assert report["memory_parameters"] == values
    model = MegamemForCausalLM.from_pretrained(out, table_placement="disk")
    assert model.config.engram_table_dtype == "float8_e4m3fn" and model.config.bank_table_dtype == "bfloat16"
    whole = MegamemForCausalLM.from_pretrained(out)
    assert torch.equal(model(sample_ids()).logits, whole(sample_ids()).logits)


def test_tables_take_the_format_that_is_asked_for(tmp_path: Path) -> None:
    source = StandIn(tmp_path / "data", formats={"engram": "fp8"})
    exact = {name: source.stored_rows(name, 0, rows) for name, (rows, _) in source.tables().items()}
    for asked, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        out = tmp_path / asked
        export_checkpoint(source, out, options={"table_format": asked}, verify=False)
        tensors = load_file(out / "model.safetensors")
        found = {name: tensor for name, tensor in tensors.items() if name.endswith(".shard_0.weight")}
        assert len(found) == 5 and {tensor.dtype for tensor in found.values()} == {dtype}
        if asked == "fp32":  # holds every fp8 value
            rows = exact["decoder.layers.1.engram.table"]
            values = dequantize_rows(rows, torch.empty(len(rows["rows"]), 3))
            assert torch.equal(found["model.layers.1.engram.table.shard_0.weight"], values)
        name = "decoder.layers.0.bank.level1.table"
        close = {"fp32": 0.0, "bf16": 2**-8, "fp8": 2**-4}[asked]
        model = MegamemForCausalLM.from_pretrained(out)
        rows = torch.arange(4)
        values = model.model.layers[0].bank.level1(rows, like=torch.empty(0))
        torch.testing.assert_close(values, source.memory_tables[name], rtol=close, atol=close / 16)


@pytest.mark.parametrize("asked", ["auto", "fp8"])
def test_a_large_table_is_never_held_as_a_whole(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamem_checkpoints.hf.source.PIECE_BYTES", 1000)
    source = StandIn(tmp_path / "data", formats={"bank": "fp8"})
    opened = Source.open(
        source, tokenizer=tmp_path / "data" / "tokenizer.model", clusters=tmp_path / "data" / "clusters.safetensors"
    )
    asked_rows: list[tuple[str, int, int]] = []

    def stored_rows(table: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        asked_rows.append((table, start, stop))
        return StandIn.stored_rows(source, table, start, stop)

    monkeypatch.setattr(source, "stored_rows", stored_rows)
    plan = plan_export("megamem", opened, {"table_files": 2, "table_format": asked})
    assert not asked_rows
    for tensor in plan.tensors:
        assert sum(len(piece) for piece in tensor.pieces()) == tensor.shape[0]
    widths = {name: width for name, (_, width) in source.tables().items()}
    assert {name for name, _, _ in asked_rows} == widths.keys()
    assert all(stop - start == 1 or (stop - start) * 4 * widths[name] <= 1000 for name, start, stop in asked_rows)


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, out = StandIn(tmp_path / "data"), tmp_path / "out"
    with pytest.raises(ExportError, match="no export to gguf; choose one of megamem, "):
        export_checkpoint(source, out, target="gguf")
    with pytest.raises(ExportError, match="an export to megamem has no merge_path; leave --merge-path out"):
        export_checkpoint(source, out, options={"merge_path": "generic", "table_files": None})
    with pytest.raises(ExportError, match="table_files is 0; set at least 1"):
        export_checkpoint(source, out, options={"table_files": 0})
    opened = Source.open(
        source, tokenizer=tmp_path / "data" / "tokenizer.model", clusters=tmp_path / "data" / "clusters.safetensors"
    )
    plan = plan_export("megamem", opened, {})
    check_plan(plan, opened)
    name = "decoder.layers.2.bank.level1.table"
    kept = [tensor for tensor in plan.tensors if name not in tensor.sources]
    expected = {tensor.name: tensor.shape for tensor in kept}
    partial = replace(plan, tensors=kept, expected=expected)
    with pytest.raises(ExportError, match=rf"{re.escape(name)} of the checkpoint has no place in a megamem model"):
        check_plan(partial, opened)
    check_plan(replace(partial, dropped={name: "for this test"}), opened)
    assert not out.exists()


def test_an_existing_directory_is_safe(tmp_path: Path) -> None:
    source, out = StandIn(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="holds something that is not an export"):
            export_checkpoint(source, out, overwrite=overwrite)
    (out / "thesis.tex").unlink()
    export_checkpoint(source, out, verify=False)
    with pytest.raises(ExportError, match=r"already holds an export.*--overwrite"):
        export_checkpoint(source, out)
    source.step = 8
    assert export_checkpoint(source, out, overwrite=True, verify=False)["step"] == 8
    source.dense["decoder.final_layernorm.weight"][0] = float("nan")
    with pytest.raises(ExportError, match="did not pass its checks: the logits of the exported model are not finite"):
        export_checkpoint(source, out, overwrite=True)
    assert json.loads((out / "export.json").read_text(encoding="utf-8"))["step"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_tensors_and_configuration_must_agree(tmp_path: Path) -> None:
    source, out = StandIn(tmp_path / "data"), tmp_path / "out"
    good = copy.copy(source.dense)
    source.dense = good | {"decoder.layers.0.novel.weight": torch.zeros(3)}
    with pytest.raises(ExportError, match=r"decoder\.layers\.0\.novel\.weight has no place"):
        export_checkpoint(source, out)
    source.dense = good | {"decoder.layers.3.input_layernorm.weight": torch.zeros(24)}
    with pytest.raises(ExportError, match="does not describe"):
        export_checkpoint(source, out)
    source.dense = {name: tensor for name, tensor in good.items() if "experts.1.linear_fc2" not in name}
    with pytest.raises(ExportError, match=r"no value for model\.layers\.2\.mlp\.experts\.1\.down_proj\.weight"):
        export_checkpoint(source, out)
    source.dense = good | {"decoder.layers.1.mlp.linear_fc2.weight": torch.zeros(24, 41)}
    with pytest.raises(ExportError, match=r"down_proj\.weight has shape \[24, 41\].* \[24, 40\]"):
        export_checkpoint(source, out)
    source.dense = good
    with pytest.raises(ExportError, match="max_shard_size is 'huge'"):
        export_checkpoint(source, out, max_shard_size="huge", verify=False)
    (tmp_path / "data" / "clusters.safetensors").unlink()
    with pytest.raises(ExportError, match=r"clusters\.safetensors cannot be read"):
        export_checkpoint(source, out)
    assert not out.exists()


def test_tokenizer_and_cluster_tree_must_be_those_of_the_run(tmp_path: Path) -> None:
    source, out = StandIn(tmp_path / "data"), tmp_path / "out"
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "data", other)
    (other / "tokenizer.model").write_bytes(tokenizer_model() + b"\x92\x03\x00")  # parses, with the same pieces
    with pytest.raises(ExportError, match=r"other/tokenizer\.model is not the tokenizer that the run was trained with"):
        export_checkpoint(source, out, tokenizer_model=other / "tokenizer.model")
    with pytest.raises(ExportError, match=r"none\.model cannot be read .* --data"):
        export_checkpoint(source, out, tokenizer_model=tmp_path / "none.model")
    tree = load_file(other / "clusters.safetensors")
    save_file(tree, other / "clusters.safetensors", {"encoder": "", "tokenizer_sha256": "0" * 64})
    with pytest.raises(ExportError, match=r"other/clusters\.safetensors is no cluster tree of the run's tokenizer"):
        export_checkpoint(source, out, clusters=other / "clusters.safetensors")
    assert not out.exists()


def test_neighbours_of_the_target_are_left_alone_and_the_target_may_be_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, here = StandIn(tmp_path / "data"), tmp_path / "out"
    here.mkdir()
    for name in ("out.tmp", "out.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    export_checkpoint(source, Path("data/../out"), verify=False)
    export_checkpoint(source, Path("out"), verify=False, overwrite=True)
    assert (tmp_path / "out.tmp" / "thesis.tex").exists() and (tmp_path / "out.old.tmp" / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "out.old.tmp", "out.tmp"]


def test_generate_notices_damaged_weights_and_foreign_models(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(StandIn(tmp_path / "data"), out, verify=False)
    (out / "README.md").write_text("edited", encoding="utf-8")
    check_files(out)
    weights = out / "model.safetensors"
    good = weights.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        weights.write_bytes(bad)
        with pytest.raises(ExportError, match=r"model\.safetensors is not what was exported; export the run again"):
            generate_verb.main([str(out), "text"])
    weights.unlink()
    with pytest.raises(ExportError, match=r"model\.safetensors cannot be read"):
        generate_verb.main([str(out), "text"])
    weights.write_bytes(good)
    (out / "export.json").write_text("{", encoding="utf-8")
    with pytest.raises(ExportError, match="is damaged"):
        generate_verb.main([str(out), "text"])
    (out / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    (out / "export.json").unlink()
    with pytest.raises(ExportError, match="holds a gpt2 model"):
        generate_verb.main([str(out), "text"])


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        export_verb.main([str(tmp_path), str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ExportError, "is no exported model", []),
        (ConfigError, "--max-new-tokens is 0", ["--max-new-tokens", "0"]),
        (ConfigError, "--temperature is -1.0", ["--temperature", "-1"]),
    ],
)
def test_generate_says_what_to_set(tmp_path: Path, error: type[Exception], message: str, arguments: list[str]) -> None:
    with pytest.raises(error, match=message):
        generate_verb.main([str(tmp_path), "text", *arguments])


def test_every_projection_row_of_a_grouped_matrix_is_taken_once() -> None:
    model = ModelConfig(num_attention_heads=6, num_query_groups=3, hidden_size=12, vocab_size=8)
    rows = torch.arange((6 + 2 * 3) * 2).view(-1, 1)
    parts = {w.name: w.part(rows) for w in map_names(["decoder.layers.4.self_attention.linear_qkv.weight"], model)}
    q, k, v = (parts[f"model.layers.4.self_attn.{name}_proj.weight"].flatten().tolist() for name in "qkv")
    assert q == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert k == [4, 5, 12, 13, 20, 21] and v == [6, 7, 14, 15, 22, 23]
    assert np.array_equal(np.sort(q + k + v), np.arange(24))
    with pytest.raises(ExportError, match="no value for b"):
        check_complete({"a": (1,)}, {"a": (1,), "b": (2,)})
