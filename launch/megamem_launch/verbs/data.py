"""``megamem data``: text in, tokenizer, token shards and document clusters out, on one machine or on many."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from megamem.errors import ConfigError
from megamem_launch.config import load_config
from megamem_launch.verbs.parse import flags_last, parse


@dataclass
class Arguments:
    """Prepare the corpus of a configuration for training.

    Reads data.sources, trains data.tokenizer (or takes an existing tokenizer), writes token shards, and sorts the documents
    into the cluster tree that memory.bank needs. The result is a directory, data.path; it appears whole or not at all, and is
    reused when the same request is made again.

    Many machines can share the work: `tokenizer` once, `prepare --shard 1/N` to `N/N` side by side, then `merge`. Shares are cut
    between the files of the sources; tokenizer, tokens and cluster paths are the same, byte for byte, and the cluster tree has the
    same fingerprint. `megamem launch data` does this with SLURM.

    Examples:
      megamem data prepare configs/quickstart.yaml
      megamem data prepare my.yaml data.path=data/mine 'data.sources=[{kind: jsonl, path: corpus/*.jsonl, text_field: body}]'
      megamem data tokenizer my.yaml
      megamem data prepare my.yaml --shard 3/16
      megamem data merge my.yaml
    """

    action: Annotated[Literal["prepare", "tokenizer", "merge"], tyro.conf.Positional]
    """What to do."""
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """YAML file of a run; its sections data, memory.bank and train.seed are used."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETTING=VALUE")] = ()
    """Settings to change, as section.setting=value."""
    shard: Annotated[str, tyro.conf.arg(metavar="I/N")] = ""
    """With `prepare`: only the I-th of N shares of the sources, for `merge`."""
    strict: bool = False
    """Refuse text that is not valid UTF-8 (by default it is counted and replaced)."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, flags_last(Arguments, argv), "data")
    config = load_config(arguments.config, arguments.overrides)
    if not config.data.path:
        raise ConfigError("data.path is empty; set the directory that the prepared data is written to")
    if not config.data.sources:
        raise ConfigError(
            "data.sources is empty; name at least one source of text, such as [{kind: folder, path: corpus}]"
        )
    share = _share(arguments)
    from megamem_data.parts import merge_parts, prepare_part, prepare_tokenizer
    from megamem_data.prepare import Job

    bank = config.memory.bank
    job = Job(
        config.data,
        branching=bank.branching,
        levels=bank.levels if bank.enabled else 0,
        seed=config.train.seed,
        strict=arguments.strict,
    )
    if arguments.action == "tokenizer":
        prepare_tokenizer(job)
    elif arguments.action == "merge":
        merge_parts(job)
    elif share is not None:
        prepare_part(job, *share)
    else:
        job.run()
    return 0


def _share(arguments: Arguments) -> tuple[int, int] | None:
    if not arguments.shard:
        return None
    if arguments.action != "prepare":
        raise ConfigError(f"--shard is a share of `prepare`; leave it out of `{arguments.action}`")
    match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(f"--shard is {arguments.shard!r}; set I/N with I from 1 to N, such as 3/16")
    return number, count
