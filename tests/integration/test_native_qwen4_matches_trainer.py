"""The native export is the trained model: equal logits in a process that has neither megamem nor remote code."""

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

CONFIG = Path(__file__).parents[2] / "configs" / "native_tiny.yaml"

# A stranger, to whom megamem is not installed and who trusts no remote code.
READER = """
import json, sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("megamem"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, request = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
assert type(model).__name__ == "Qwen4ExpForCausalLM" and model.dtype == torch.float32
with torch.no_grad():
    logits = [model(torch.tensor([tokens])).logits[0].numpy() for tokens in json.load(open(request))]
np.save(request + ".npy", np.concatenate(logits))
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("import os\\n\\ndef main(", return_tensors="pt")
settings = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)
cached = model.generate(**prompt, use_cache=True, **settings)
assert torch.equal(cached, model.generate(**prompt, use_cache=False, **settings))
assert cached.shape[1] == prompt["input_ids"].shape[1] + 24
"""


def trainer_logits(overrides: list[str]) -> list[tuple[list[int], np.ndarray]]:
    """Tokens and logits of each document of a validation batch, by the trained model on one rank."""
    from megamem.batch import StepBatch
    from megamem.models.micro import MicroContext
    from megamem.parallel import groups as parallel_groups
    from megamem.parallel.layout import Layout
    from megamem_launch.compose import build_parts, open_data

    config = load_config(CONFIG, [*overrides, "train.eval_batches=1"])
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
    memory = parts.memory.take(parts.memory.submit(StepBatch(0, (micro,)), train=False))
    context = MicroContext.from_batch(micro, groups.device, memory.micro(0))
    tokens = torch.from_numpy(micro.tokens)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = parts.model[0](tokens, positions, None, packed_seq_params=context)[..., : data.vocab_size]
    documents = [micro.document_ids == document for document in range(len(micro.document_paths))]
    parts.loader.close()
    parts.validation.close()
    parallel_groups.destroy()
    return [(micro.tokens[where].tolist(), logits[torch.from_numpy(where)].numpy()) for where in documents]


CASES = {
    "moe-N3-two-engrams-tp2-pp2": (
        ["model.moe.shared_expert_hidden_size=32", "train.micro_batch_size=2"],
        [
            "parallel.nproc=4",
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            "parallel.pipeline_model_parallel_size=2",
        ],
    ),
    "dense-N4-untied": (
        [
            "model.moe.layers=[]",
            "memory.engram={layers: [1], orders: [2, 3, 4]}",
            "model.untie_embeddings_and_output_weights=true",
        ],
        [],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param("moe-N3-two-engrams-tp2-pp2", marks=pytest.mark.slow), "dense-N4-untied"]
)
def test_native_logits_equal_the_trainers(name: str, prepared_tiny: Path, tmp_path: Path) -> None:
    model, layout = CASES[name]
    overrides = [
        f"runs_dir={tmp_path}",
        f"data.path={prepared_tiny}",
        "train.steps=8",
        "train.precision=fp32",
        "train.eval_batches=0",
        "tracking.mlflow=false",
        "optimizer.lr=1e-2",
        *model,
    ]

    def megamem(*words: str) -> None:
        command = [sys.executable, "-m", "megamem.cli", *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
        assert result.returncode == 0, result.stderr[-4000:]

    megamem("train", str(CONFIG), *overrides, *layout)
    megamem("export", str(tmp_path / "native_tiny"), str(tmp_path / "out"), "--to", "qwen4_exp", "--no-verify")
    # What --verify would check, the stranger checks below.
    assert not list((tmp_path / "out").glob("*.py"))
    documents = run_distributed(trainer_logits, 1, overrides)[0]
    request = tmp_path / "request.json"
    request.write_text(json.dumps([tokens for tokens, _ in documents]))
    result = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "out"), str(request)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    ours = np.concatenate([logits for _, logits in documents])
    theirs = np.load(f"{request}.npy")
    assert np.abs(ours).max() > 0.5
    np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=0)
