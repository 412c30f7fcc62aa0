"""The exported model is the trained model: equal logits, from any layout, without megamem being imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megamem.testing.distributed import run_distributed
from megamem_launch.config import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"

# Loads the export as a stranger would, where nothing of megamem is installed, and with its tables on disk.
READER = """
import json, sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("megamem") and "." not in name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, request = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, table_placement="disk"
).eval()
logits = []
for item in json.load(open(request)):
    paths = torch.tensor([item["path"]])
    with torch.no_grad():
        logits.append(model(input_ids=torch.tensor([item["tokens"]]), memory_paths=paths).logits[0].numpy())
np.save(request + ".npy", np.concatenate(logits))
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("import os\\n\\ndef main(", return_tensors="pt", split_special_tokens=True)
settings = dict(max_new_tokens=24, do_sample=False)
cached = model.generate(**prompt, use_cache=True, **settings)
uncached = model.generate(**prompt, use_cache=False, **settings)
assert torch.equal(cached, uncached), (cached, uncached)
assert cached.shape[1] > prompt["input_ids"].shape[1]
assert not any(name.split(".")[0].startswith("megamem") for name in sys.modules)
"""


def settings(folder: Path, data: Path, extra: list[str]) -> list[str]:
    return [
        f"runs_dir={folder}",
        f"data.path={data}",
        "train.steps=12",
        "train.precision=fp32",
        "train.eval_batches=0",
        "tracking.mlflow=false",
        "model.make_vocab_size_divisible_by=64",
        "model.moe.shared_expert_hidden_size=32",
        "optimizer.lr=1e-2",
        *extra,
    ]


def trainer_logits(config_path: str, overrides: list[str]) -> list[tuple[list[int], list[int], np.ndarray]]:
    """Tokens, cluster path and logits of each document of a validation batch, by the trained model on one rank."""
    from megamem.batch import StepBatch
    from megamem.models.micro import MicroContext
    from megamem.parallel import groups as parallel_groups
    from megamem.parallel.layout import Layout
    from megamem_launch.compose import build_parts, open_data

    config = load_config(config_path, [*overrides, "train.eval_batches=1"])
    data = open_data(config)
    groups = parallel_groups.initialize(Layout(), seed=1)
    parts = build_parts(config, data, groups)
    latest = parts.checkpointer.latest()
    assert latest is not None
    parts.checkpointer.load(
        latest,
        entries=parts.entries,
        put_state=parts.zero.load_full_state,
        tables=parts.memory.tables,
        optimizer_state=False,
    )
    assert parts.validation is not None
    micro = parts.validation.batch(0).micro_batches[0]
    memory = parts.memory.take(parts.memory.submit(StepBatch(0, (micro,)), train=False))
    context = MicroContext.from_batch(micro, groups.device, memory.micro(0))
    tokens = torch.from_numpy(micro.tokens)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = parts.model[0](tokens, positions, None, packed_seq_params=context)[..., : data.vocab_size]
    documents = []
    for document, path in enumerate(micro.document_paths):
        where = micro.document_ids == document
        documents.append((micro.tokens[where].tolist(), path.tolist(), logits[torch.from_numpy(where)].numpy()))
    parts.loader.close()
    parts.validation.close()
    parallel_groups.destroy()
    return documents


# Settings of the model and its tables, those of the layout, and options of the export.
LAYOUTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "one-process": (
        [
            "memory.engram.fold_tokens=true",
            "memory.bank.units=[0, 4]",
            "memory.storage.format=fp8",
            "model.moe.router=sigmoid_bias",
            "model.layernorm_zero_centered_gamma=false",
            "model.rope_scaling_factor=8",
            "model.rotary_base=1e6",
        ],
        [],
        ["--table-files", "2"],
    ),
    "tp2-pp2": (
        [
            "memory.engram.layers=[0, 3]",
            "memory.engram.sqrt_gate=false",
            "memory.engram.conv_kernel_size=2",
            "memory.placement=scrambled",
            "model.untie_embeddings_and_output_weights=true",
        ],
        [
            "parallel.nproc=4",
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            "parallel.pipeline_model_parallel_size=2",
        ],
        [],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "tp2-pp2" else []) for name in LAYOUTS]
)
def test_exported_logits_equal_the_trainers(name: str, prepared_tiny: Path, tmp_path: Path) -> None:
    model, layout, options = LAYOUTS[name]
    overrides = settings(tmp_path, prepared_tiny, model)

    def megamem(*words: str) -> None:
        command = [sys.executable, "-m", "megamem.cli", *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert result.returncode == 0, result.stderr[-4000:]

    megamem("train", str(CONFIG), *overrides, *layout)
    megamem("export", str(tmp_path / "tiny"), str(tmp_path / "out"), *options)
    documents = run_distributed(trainer_logits, 1, str(CONFIG), overrides)[0]
    assert len(documents) >= 1
    request = tmp_path / "request.json"
    request.write_text(json.dumps([{"tokens": tokens, "path": path} for tokens, path, _ in documents]))
    result = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "out"), str(request)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    ours = np.concatenate([logits for _, _, logits in documents])
    theirs = np.load(f"{request}.npy")
    assert np.abs(ours).max() > 0.5
    np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=1e-5)
