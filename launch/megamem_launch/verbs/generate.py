"""``megamem generate``: text from an exported model."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megamem.errors import ConfigError
from megamem_launch.verbs.parse import parse

_NO_ROUTER = (
    "reading the generic memory: this export cannot route prompts, its documents were clustered by a sentence encoder"
)


@dataclass
class Arguments:
    """Continue a text with an exported model.

    The model is opened offline and runs the modelling code of its directory. A model with a memory bank reads the
    blocks of the clusters that the prompt belongs to.

    Examples:
      megamem generate runs/quickstart/huggingface "def read_file(path):"
      megamem generate exports/big "The capital of France" --max-new-tokens 20 --temperature 0.8 --seed 3
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory that `megamem export` wrote."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue."""
    max_new_tokens: int = 64
    """Most tokens to write; the model may end its document sooner."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; higher values sample more freely."""
    seed: int = 0
    """Of sampling."""
    tables: Literal["device", "cpu", "disk"] = "disk"
    """Where memory tables are: on the accelerator, in host memory, or mapped from the weight files and read row by row."""
    generic: bool = False
    """Read the generic block of a memory bank in place of the prompt's own."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, argv, "generate")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}; set at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise ConfigError(f"--temperature is {arguments.temperature}; set 0 or more")
    if not 0 <= arguments.seed < 2**32:
        raise ConfigError(f"--seed is {arguments.seed}; set a number from 0 to {2**32 - 1}")
    if any("\ud800" <= character <= "\udfff" for character in arguments.prompt):  # how Python shows undecodable bytes
        raise ConfigError("the prompt is not valid UTF-8; convert it")
    from megamem_checkpoints.hf.verify import check_files

    check_files(arguments.model)
    print(generate(arguments))
    return 0


def generate(arguments: Arguments) -> str:
    """The prompt and its continuation."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    import torch
    from transformers import set_seed

    from megamem_launch.exported import open_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = open_model(arguments.model, device=device, dtype="auto", tables=arguments.tables)
    config = model.config
    # As documents in training: nothing in front, and text that looks like a special token is text.
    inputs = tokenizer(arguments.prompt, add_special_tokens=False, split_special_tokens=True, return_tensors="pt").to(
        device
    )
    if inputs.input_ids.shape[1] == 0:
        raise ConfigError("the prompt is empty; give the model at least one character to continue")
    settings: dict[str, Any] = {"do_sample": False}
    if arguments.temperature:
        set_seed(arguments.seed)
        settings = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0}
    if any(getattr(config, "bank_units", ())) and not arguments.generic:
        if config.router_dimensions:
            settings["memory_paths"] = model.route(inputs.input_ids)
        else:
            print(_NO_ROUTER, file=sys.stderr)
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=arguments.max_new_tokens,
        **settings,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
