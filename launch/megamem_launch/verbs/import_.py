"""``megamem import``: a Hugging Face model as a run, to train on or to add memories to."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megamem.config import to_dict
from megamem.errors import ConfigError, ExportError
from megamem_launch.config import RunConfig, save_config
from megamem_launch.verbs.parse import parse


@dataclass
class Arguments:
    """Turn a Llama, Qwen3, Qwen3-MoE or Mixtral checkpoint into a run of step 0: config.yaml, tokenizer and weights.

    Nothing is rounded: an export to the same kind of model gives back every tensor. The checkpoint has no optimizer state;
    start a run of your own from it with checkpoint.load, under any layout, with memories of its own if you like.

    Examples:
      megamem import downloads/Llama-3.2-1B runs/llama-1b
      megamem data prepare runs/llama-1b data.path=data/mine 'data.sources=[{kind: jsonl, path: corpus/*.jsonl}]'
      megamem train runs/llama-1b name=llama-engram checkpoint.load=runs/llama-1b checkpoint.new_memories=true \\
        data.path=data/mine memory.engram.layers=[1,8]
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="HF_DIR")]
    """Directory with config.json, safetensors weights and tokenizer.json."""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run, new or empty."""
    seq_length: int = 0
    """data.seq_length of the run; 0 takes the model's context, at most 4096 tokens."""
    make_vocab_size_divisible_by: int = 128
    """Rows of the embedding are a multiple of this, so that tensor-parallel ranks can share them; the added rows are zero."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, argv, "import")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from megamem_checkpoints.hf.pretrained import Pretrained

    run = arguments.run
    if arguments.seq_length and arguments.seq_length < 2:
        raise ConfigError(f"--seq-length is {arguments.seq_length}; set at least 2, or 0 for the model's context")
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise ConfigError(f"{run} exists and is not empty; choose another directory for the run")
    pretrained = Pretrained.open(arguments.model, make_vocab_size_divisible_by=arguments.make_vocab_size_divisible_by)
    temporary = run.absolute().with_name(f".{run.name}.importing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        config = _write(pretrained, temporary, run, arguments.seq_length)
        os.replace(temporary, run)
    except OSError as error:
        raise ExportError(f"{run} cannot be written ({error}); free space there or choose another directory") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parameters = sum(math.prod(shape) for _, shape, _ in pretrained.tensors.values())
    print(f"{run}: {pretrained.family}, {parameters:,} parameters, {config.model.num_layers} layers, step 0")
    for name, reason in pretrained.dropped.items():
        print(f"left out {name}: {reason}")
    return 0


def _write(pretrained: Any, folder: Path, run: Path, seq_length: int) -> RunConfig:
    """Fill ``folder``, which will be ``run``; returns the configuration."""
    from megamem_checkpoints.hf.import_model import copy_tokenizer, write_checkpoint
    from megamem_checkpoints.hf.tokenizer import check_import
    from megamem_data.tokenizer import open_tokenizer

    model_file = copy_tokenizer(pretrained.folder, folder / "tokenizer")
    tokenizer = open_tokenizer(model_file)
    if tokenizer.vocab_size > pretrained.model.vocab_size:
        raise ExportError(
            f"the tokenizer of {pretrained.folder} has {tokenizer.vocab_size} entries and the model only "
            f"{pretrained.model.vocab_size}; put the model's own tokenizer there"
        )
    check_import(model_file, pretrained.config)
    config = RunConfig(name=run.absolute().name, runs_dir=str(run.parent), model=pretrained.model)
    config.data.tokenizer.model = str(run / "tokenizer" / model_file.name)
    config.data.seq_length = seq_length or min(pretrained.config.max_position_embeddings, 4096)
    config.train.precision = pretrained.precision
    write_checkpoint(
        pretrained,
        folder / "checkpoints",
        meta={
            "config": to_dict(config),
            "vocab_size": config.model.vocab_size,
            "precision": pretrained.precision,
            "eos_id": tokenizer.eos_id,
            "tokenizer_sha256": tokenizer.sha256,
            "tokens_seen": 0,
            "final_losses": {},
            "imported": pretrained.inherited,
        },
    )
    save_config(config, folder / "config.yaml")
    return config
