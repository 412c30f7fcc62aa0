"""``megamem export``: a run as a Hugging Face model directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megamem.errors import ExportError
from megamem_launch.verbs.parse import parse

_SAMPLED_DOCUMENTS = 64


@dataclass
class Arguments:
    """Turn a run into a directory that Hugging Face transformers opens, memories included.

    The directory holds safetensors weights, the tokenizer, a model card and, for `--to megamem`, the modelling code. It
    appears only after the checks have passed: checksums of the checkpoint, token ids against sentencepiece, offline
    reload in a new process, cached against uncached inference. What was checked is in export.json.

    Examples:
      megamem export runs/quickstart runs/quickstart/huggingface
      megamem export runs/big/checkpoints/step_00001000 exports/big-1000 --dtype bf16 --license apache-2.0
      megamem export runs/big exports/big-fp8 --table-files 8 --table-format fp8
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of a run, whose latest checkpoint is taken, or one checkpoint."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory to write."""
    to: Literal["megamem", "qwen4_exp", "llama", "qwen3", "qwen3_moe", "mixtral", "native"] = "megamem"
    """Kind of model: megamem keeps everything and carries its own modelling code; the others open without it, if the model fits
    (docs/huggingface.md). native: whichever of llama, qwen3, qwen3_moe and mixtral fits."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the dense weights; auto is bf16 for a run with train.precision=bf16, else fp32."""
    table_files: int | None = None
    """Weight files for the memory tables alone, each with a range of rows of every table. By default tables are among the other
    tensors: whole, or for `--to qwen4_exp` cut at 256 MiB."""
    table_format: Literal["fp32", "bf16", "fp8"] | None = None
    """Of the rows of memory tables; by default what the run stores, bit for bit. fp8 is E4M3 with one power-of-two scale per 32
    values."""
    merge_path: str | None = None
    """For models without memories (llama, qwen3, qwen3_moe, mixtral, native): read the bank along this path for every text, as
    wider feed-forward layers: generic, or one cluster per level such as 3,17."""
    data: Path | None = None
    """Prepared data of the run, for its tokenizer and cluster tree, when it is no longer at data.path."""
    license: str = ""
    """Identifier for the model card, such as apache-2.0."""
    max_shard_size: str = "5GB"
    """Upper bound of one weight file; a larger tensor has a file of its own."""
    overwrite: bool = False
    """Replace an earlier export at OUT."""
    verify: bool = True
    """On by default: check the checksums, and inference after reloading in fp32. Reloading needs 4 bytes of host memory for each
    parameter; only the tables of `--to megamem` stay in their files. --no-verify leaves all of this out."""


def main(argv: list[str]) -> int:
    """Entry of the verb."""
    arguments = parse(Arguments, argv, "export")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from megamem_checkpoints.directory import find_checkpoint
    from megamem_checkpoints.hf.export import export_checkpoint
    from megamem_checkpoints.hf.tokenizer import find_tokenizer
    from megamem_checkpoints.reader import CheckpointReader

    checkpoint = find_checkpoint(arguments.run)
    reader = CheckpointReader(checkpoint)
    data = arguments.data or Path(reader.meta["config"]["data"]["path"])
    report = export_checkpoint(
        reader,
        arguments.out,
        target=arguments.to,
        options={
            "table_files": arguments.table_files,
            "table_format": arguments.table_format,
            "merge_path": arguments.merge_path,
        },
        origin=str(checkpoint),
        dtype=arguments.dtype,
        tokenizer_model=find_tokenizer(reader.meta["config"], arguments.data),
        clusters=data / "clusters.safetensors",
        sample=_documents(data, reader.meta["data"]["data"]) if "data" in reader.meta else (),
        license=arguments.license,
        max_shard_size=int(arguments.max_shard_size)
        if arguments.max_shard_size.isdigit()
        else arguments.max_shard_size,
        overwrite=arguments.overwrite,
        verify=arguments.verify,
    )
    size = sum(file["bytes"] for file in report["files"].values())
    parameters = f"{report['parameters']:,} parameters, {report['dtype']}, {size / 1e6:,.1f} MB"
    print(f"{arguments.out}: step {report['step']}, {parameters}")
    checks = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in report["checks"].items())
    skipped = "" if arguments.verify else "; neither checksums nor inference (--no-verify)"
    print(f"checked: {checks}{skipped}")
    return 0


def _short(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value).lower()


def _documents(folder: Path, fingerprint: str) -> list[str]:
    """Text of the first documents of the run's prepared data; none where only the tokenizer is left of it.

    ExportError where ``folder`` holds other data than the run was trained on, as its tokenizer may be another one.
    """
    from megamem_data.prepared import MANIFEST, PreparedData

    if not (folder / MANIFEST).exists():
        return []
    data = PreparedData.open(folder)
    if data.fingerprint != fingerprint:
        raise ExportError(f"{folder} is not the data that the run was trained on; name that with --data")
    shard = data.shards[0]
    texts, start = [], 0
    for length in shard.lengths[:_SAMPLED_DOCUMENTS].tolist():
        texts.append(data.tokenizer.decode(shard.tokens[start : start + length]))
        start += length
    return texts
