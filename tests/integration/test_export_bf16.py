"""A run trained in bf16, exported in bf16: its weights are the rounded masters, and it computes what the trainer computes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from megamem.config import build
from megamem.models.config import ModelConfig
from megamem.testing.distributed import run_distributed
from megamem_checkpoints.directory import find_checkpoint
from megamem_checkpoints.hf.mapping import map_names
from megamem_checkpoints.hf.remote_code.modeling_megamem import MegamemForCausalLM
from megamem_checkpoints.reader import CheckpointReader

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def trainer_logits(overrides: list[str]) -> list[tuple[list[int], list[int], np.ndarray]]:
    """Tokens, cluster path and logits (as fp32) of each document of a validation batch, by the bf16 weights of training."""
    from megamem.batch import StepBatch
    from megamem.models.micro import MicroContext
    from megamem.parallel import groups as parallel_groups
    from megamem.parallel.layout import Layout
    from megamem_launch.compose import build_parts, open_data
    from megamem_launch.config import load_config

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
    assert {parameter.dtype for parameter in parts.model.parameters()} == {torch.bfloat16}
    micro = parts.validation.batch(0).micro_batches[0]
    memory = parts.memory.take(parts.memory.submit(StepBatch(0, (micro,)), train=False))
    context = MicroContext.from_batch(micro, groups.device, memory.micro(0))
    tokens = torch.from_numpy(micro.tokens)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = parts.model[0](tokens, positions, None, packed_seq_params=context)[..., : data.vocab_size]
    found = []
    for document, path in enumerate(micro.document_paths):
        where = micro.document_ids == document
        found.append((micro.tokens[where].tolist(), path.tolist(), logits[torch.from_numpy(where)].float().numpy()))
    parts.close()
    parallel_groups.destroy()
    return found


@torch.no_grad()
def test_a_bf16_export_is_the_bf16_model_of_training(prepared_tiny: Path, tmp_path: Path) -> None:
    overrides = [f"runs_dir={tmp_path}", f"data.path={prepared_tiny}", "train.steps=8", "train.precision=bf16"]
    overrides += ["train.eval_batches=0", "tracking.mlflow=false", "optimizer.lr=1e-2"]
    run, out = tmp_path / "tiny", tmp_path / "out"
    for words in (["train", str(CONFIG), *overrides], ["export", str(run), str(out), "--no-verify"]):
        command = [sys.executable, "-m", "megamem.cli", *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert result.returncode == 0, result.stderr[-4000:]

    reader = CheckpointReader(find_checkpoint(run))
    exported = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights = map_names(reader.names(), build(ModelConfig, reader.meta["config"]["model"]))
    assert weights
    rounded = 0
    for weight in weights:
        master = weight.part(reader.tensor(weight.source))
        assert exported[weight.name].dtype == torch.bfloat16
        assert torch.equal(exported[weight.name], master.bfloat16()), weight.name
        rounded += int((master != master.bfloat16().float()).sum())
    assert rounded > 0  # masters hold more than the export

    documents = run_distributed(trainer_logits, 1, overrides)[0]
    model = MegamemForCausalLM.from_pretrained(out).eval()
    assert model.dtype == torch.bfloat16
    exact = MegamemForCausalLM.from_pretrained(out, dtype=torch.float32).eval()  # the same numbers, computed in fp32

    def logits(model: MegamemForCausalLM) -> np.ndarray:
        batches = [(torch.tensor([tokens]), torch.tensor([path])) for tokens, path, _ in documents]
        return np.concatenate([model(ids, memory_paths=paths).logits[0].float().numpy() for ids, paths in batches])

    ours, theirs, reference = np.concatenate([found for _, _, found in documents]), logits(model), logits(exact)
    largest = float(np.abs(ours).max())
    assert largest > 0.5
    # Both round at the same places and sum in other orders: a logit differs by a last bit here and there (8 bits of precision), and
    # on average by well less than what computing in bf16 costs. How far the furthest of 65,536 is depends on the text.
    step = 2.0 ** (math.floor(math.log2(largest)) - 7)
    apart = np.abs(theirs - ours)
    assert (apart > 2 * step).mean() < 1e-4 and apart.max() <= 4 * step
    assert apart.mean() < 0.5 * np.abs(ours - reference).mean()
    assert np.abs(theirs - reference).mean() < 1.05 * np.abs(ours - reference).mean()  # neither is the better one
