"""Runs without memories, or with a bank read along one path, as models that transformers knows; and imported ones trained on."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamem.errors import ExportError
from megamem.testing.distributed import run_distributed
from megamem.testing.pretrained import END, write_pretrained
from megamem_launch.config import load_config
from megamem_launch.verbs import export, import_

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
TP2_PP2 = [
    "parallel.nproc=4",
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.pipeline_model_parallel_size=2",
]

# A stranger without megamem, who trusts no remote code.
READER = """
import json, sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("megamem"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
import numpy as np, torch
from transformers import AutoModelForCausalLM
folder, request = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = [model(torch.tensor([tokens])).logits[0].numpy() for tokens in json.load(open(request))]
np.save(request + ".npy", np.concatenate(logits))
print(model.config.model_type)
"""


def megamem(*words: str) -> str:
    command = [sys.executable, "-m", "megamem.cli", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def trainer_logits(overrides: list[str], path: list[int]) -> list[tuple[list[int], np.ndarray]]:
    """Tokens and logits of each document of a validation batch, which all read the blocks of ``path``."""
    from megamem.batch import StepBatch
    from megamem.models.micro import MicroContext
    from megamem.parallel import groups as parallel_groups
    from megamem.parallel.layout import Layout
    from megamem_launch.compose import build_parts, open_data

    config = load_config(str(CONFIG), [*overrides, "train.eval_batches=1"])
    data = open_data(config)
    groups = parallel_groups.initialize(Layout(), seed=1)
    parts = build_parts(config, data, groups)
    latest = parts.checkpointer.latest()
    assert latest is not None and parts.validation is not None
    parts.checkpointer.load(
        latest,
        entries=parts.entries,
        put_state=parts.zero.load_full_state,
        tables=parts.memory.tables,
        optimizer_state=False,
    )
    micro = parts.validation.batch(0).micro_batches[0]
    paths = np.tile(np.array(path, dtype=np.int64), (len(micro.document_paths), 1))
    micro = dataclasses.replace(micro, document_paths=paths)
    memory = parts.memory.take(parts.memory.submit(StepBatch(0, (micro,)), train=False))
    context = MicroContext.from_batch(micro, groups.device, memory.micro(0))
    tokens = torch.from_numpy(micro.tokens)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = parts.model[0](tokens, positions, None, packed_seq_params=context)[..., : data.vocab_size]
    found = []
    for document in range(len(paths)):
        where = micro.document_ids == document
        found.append((micro.tokens[where].tolist(), logits[torch.from_numpy(where)].numpy()))
    parts.close()
    parallel_groups.destroy()
    return found


_BANK = ["model.moe.layers=[]", "memory.bank.units=[8,4]", "memory.bank.layers=[1,3]"]
CASES: dict[str, tuple[str, list[str], list[str], list[int]]] = {
    "llama": ("llama", [*_BANK, "model.qk_layernorm=false"], ["--merge-path", "2,9"], [2, 9]),
    "qwen3": ("qwen3", _BANK, ["--merge-path", "2,9"], [2, 9]),
    "experts": (
        "qwen3_moe",
        [
            "memory.bank.units=[]",
            "model.layernorm_zero_centered_gamma=false",
            "model.untie_embeddings_and_output_weights=true",
        ],
        [],
        [],
    ),
}


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "experts"))])
def test_logits_equal_the_trainers_without_remote_code(name: str, prepared_tiny: Path, tmp_path: Path) -> None:
    family, model, options, path = CASES[name]
    overrides = [
        f"runs_dir={tmp_path}",
        f"data.path={prepared_tiny}",
        "train.steps=8",
        "train.precision=fp32",
        "train.eval_batches=0",
        "tracking.mlflow=false",
        "memory.engram.layers=[]",
        "optimizer.lr=1e-2",
        *model,
    ]
    megamem("train", str(CONFIG), *overrides, *TP2_PP2)
    out = tmp_path / "out"
    megamem("export", str(tmp_path / "tiny"), str(out), "--to", "native", *options)
    documents = run_distributed(trainer_logits, 1, overrides, path)[0]
    request = tmp_path / "request.json"
    request.write_text(json.dumps([tokens for tokens, _ in documents]))
    command = [sys.executable, "-c", READER, str(out), str(request)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split() == [family]
    ours, theirs = np.concatenate([logits for _, logits in documents]), np.load(f"{request}.npy")
    assert np.abs(ours).max() > 0.5
    np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=1e-5)


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["kind"] == "step"]


def test_memories_are_added_to_an_imported_model(tmp_path: Path) -> None:
    runs, corpus = tmp_path / "runs", tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        text = f"document {number}: " + " ".join(str(number * k % 17) for k in range(40))
        (corpus / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    ends = {"eos_token_id": [END, END + 1], "bos_token_id": END + 2}
    write_pretrained(tmp_path / "hf", "llama", max_position_embeddings=131072, **ends)
    base = runs / "base"
    assert import_.main([str(tmp_path / "hf"), str(base), "--seq-length", "32"]) == 0
    settings: list[Any] = [f"data.path={tmp_path / 'data'}", f"data.sources=[{{kind: folder, path: {corpus}}}]"]
    settings += ["data.validation_fraction=0.1", "data.workers=1", "train.eval_batches=0", "tracking.mlflow=false"]
    settings += ["train.steps=2", "train.global_batch_size=4", "optimizer.warmup_steps=0", "train.log_interval=1"]
    megamem("data", "prepare", str(base), *settings)
    load = f"checkpoint.load={base}"
    megamem("train", str(base), "name=plain", load, *settings)
    engram = ["memory.engram.layers=[1]", "memory.engram.rows_per_head=101", "memory.engram.heads=2"]
    engram += ["memory.engram.fold_tokens=true", "memory.engram.width=4", "checkpoint.new_memories=true"]
    stages = ["parallel.nproc=2", "parallel.pipeline_model_parallel_size=2"]
    megamem("train", str(base), "name=engram", load, *settings, *engram, *stages)
    plain, with_memory = losses(runs / "plain"), losses(runs / "engram")
    assert len(plain) == len(with_memory) == 2
    assert 0 < abs(with_memory[0] - plain[0]) < 0.05 * plain[0]
    assert with_memory[1] < with_memory[0]
    with pytest.raises(ExportError, match=r"the model is no llama model: memory\.engram\.layers is \[1\]"):
        export.main([str(runs / "engram"), str(tmp_path / "out"), "--to", "native"])
    assert export.main([str(runs / "plain"), str(tmp_path / "out"), "--to", "llama", "--no-verify"]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert {"max_position_embeddings": 131072, **ends}.items() <= config.items()
    assert ends.items() <= json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8")).items()
