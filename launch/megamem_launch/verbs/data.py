"""``megamem data prepare``: text in, tokenizer, token shards and document clusters out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from megamem.errors import ConfigError
from megamem_launch.config import load_config
from megamem_launch.verbs.parse import parse


@dataclass
class Arguments:
    """Prepare the corpus of a configuration for training.

    Reads data.sources, trains data.tokenizer (or takes an existing sentencepiece model), writes token shards, and sorts the
    documents into the cluster tree that memory.bank needs. The result is a directory, data.path; it appears whole or not
    at all, and is reused when the same request is made again.

    Examples:
      megamem data prepare configs/quickstart.yaml
      megamem data prepare my.yaml data.path=data/mine 'data.sources=[{kind: jsonl, path: corpus/*.jsonl, text_field: body}]'
    """

    action: Annotated[Literal["prepare"], tyro.conf.Positional]
    """What to do."""
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """YAML file of a run; its sections data, memory.bank and train.seed are used."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETTING=VALUE")] = ()
    """Settings to change, as section.setting=value."""
    strict: bool = False
    """Refuse text that is not valid UTF-8 (by default it is counted and replaced)."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    flags_last = sorted(argv, key=lambda argument: argument.startswith("-"))  # settings may stand on either side
    arguments = parse(Arguments, flags_last, "data")
    config = load_config(arguments.config, arguments.overrides)
    if not config.data.path:
        raise ConfigError("data.path is empty; set the directory that the prepared data is written to")
    if not config.data.sources:
        raise ConfigError(
            "data.sources is empty; name at least one source of text, such as [{kind: folder, path: corpus}]"
        )
    from megamem_data.prepare import prepare

    bank = config.memory.bank
    prepare(
        config.data,
        branching=bank.branching,
        levels=bank.levels if bank.enabled else 0,
        seed=config.train.seed,
        strict=arguments.strict,
    )
    return 0
