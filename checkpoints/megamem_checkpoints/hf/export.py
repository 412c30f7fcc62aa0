"""A checkpoint as a Hugging Face model directory: weights, configuration, tokenizer, modelling code, model card."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from megamem.errors import ExportError
from megamem.files import fsync
from megamem_checkpoints.files import record
from megamem_checkpoints.hf.card import model_card
from megamem_checkpoints.hf.inherited import generation_settings
from megamem_checkpoints.hf.mapping import check_complete
from megamem_checkpoints.hf.plan import ExportPlan
from megamem_checkpoints.hf.source import Reader, Source
from megamem_checkpoints.hf.targets import plan_export
from megamem_checkpoints.hf.tokenizer import check_export, export_tokenizer, find_tokenizer
from megamem_checkpoints.hf.verify import REPORT, verify_in_new_process
from megamem_checkpoints.hf.write import write_weights
from megamem_checkpoints.manifest import FileRecord


def export_checkpoint(
    reader: Reader,
    out: Path,
    *,
    target: str = "megamem",
    options: Mapping[str, Any] | None = None,
    origin: str = "",
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    tokenizer_model: Path | None = None,
    clusters: Path | None = None,
    sample: Sequence[str] = (),
    license: str = "",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Write a model directory that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open.

    It appears whole or not at all, and only after its checks have passed. Weights are streamed: at any moment, one dense
    tensor or one piece of a table is in memory, and one tensor that others are cut from. Returns the content of ``export.json``.

    Args:
        reader: The checkpoint.
        out: The directory, which must be empty or new.
        target: The kind of model, a key of :data:`megamem_checkpoints.hf.targets.TARGETS`.
        options: What the target can be told; None stands for its default.
        origin: Name of the checkpoint, for the record.
        dtype: Of the dense parameters; ``auto`` is bf16 for a run that trained in bf16, else fp32.
        tokenizer_model: The run's tokenizer; None takes the one in the run's prepared data, or that of an imported run.
        clusters: Cluster tree of the documents, for models with a bank; None takes the one in the run's prepared data.
        sample: Texts on which the tokenizer is compared with sentencepiece, beside built-in ones.
        license: Identifier for the model card, such as ``apache-2.0``; empty leaves it unspecified.
        max_shard_size: Upper bound of one weight file, in bytes or like ``"5GB"``; a larger tensor gets a file of its own.
        overwrite: Replace an earlier export at ``out``.
        verify: Check the checkpoint's checksums, then load the export in a new process, in fp32, and compare cached with
            uncached inference. Needs the memory of :func:`~megamem_checkpoints.hf.verify.verify`.

    Raises:
        ExportError: ``out`` is in the way, the checkpoint does not fit its own configuration or the target, the tokenizer
            cannot be reproduced, or a check failed.
        CheckpointError: a file of the checkpoint is damaged.
    """
    out = out.resolve()
    _refuse_to_replace(out, overwrite)
    data = Path(reader.meta["config"]["data"]["path"])
    source = Source.open(
        reader,
        tokenizer=tokenizer_model or find_tokenizer(reader.meta["config"]),
        clusters=clusters or data / "clusters.safetensors",
        dtype=dtype,
    )
    _check_tokenizer(source.tokenizer, source.meta["tokenizer_sha256"])
    plan = plan_export(target, source, options or {})
    check_plan(plan, source)
    if verify:
        reader.verify()
    temporary = out.with_name(f".{out.name}.exporting")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Before the configuration: transformers asks about remote code where a tokenizer lies beside one that has some.
        export_tokenizer(source.tokenizer, temporary, max_length=source.seq_length)
        plan.config.save_pretrained(temporary)
        texts = check_export(temporary, plan.config, source.tokenizer, sample)
        checks: dict[str, Any] = {"tokenizer_texts": texts}
        report = {"origin": origin, "target": target, "step": reader.step, "checks": checks, **_counts(plan, source)}
        records = write_weights(temporary, plan.tensors, max_shard_size)
        for path in plan.code:
            shutil.copyfile(path, temporary / path.name)
        generation = json.dumps(generation_settings(source.meta), indent=2)
        (temporary / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
        card = model_card(source.meta, report, plan, license=license)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if verify:
            checks |= verify_in_new_process(temporary)
        _seal(temporary, report, records)
        _replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out} cannot be written ({error}); free space there or choose another directory") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def check_plan(plan: ExportPlan, source: Source) -> None:
    """ExportError unless every tensor of the architecture is written, and every one of the checkpoint is used or dropped."""
    check_complete({tensor.name: tensor.shape for tensor in plan.tensors}, plan.expected)
    accounted = {name for tensor in plan.tensors for name in tensor.sources} | plan.dropped.keys()
    if forgotten := sorted(source.shapes().keys() - accounted):
        raise ExportError(
            f"{forgotten[0]} of the checkpoint has no place in a {plan.model_type} model ({len(forgotten)} tensors are left "
            "over); choose another target"
        )


def _counts(plan: ExportPlan, source: Source) -> dict[str, Any]:
    """What the report tells about the model: dtype, values that come from the checkpoint, those of them in tables."""
    learned = [tensor for tensor in plan.tensors if tensor.sources and tensor.dtype.is_floating_point]
    kept = {name for tensor in learned for name in tensor.sources}
    return {
        "model_type": plan.model_type,
        "seq_length": source.seq_length,
        "dtype": str(source.dtype).removeprefix("torch."),
        "parameters": sum(math.prod(tensor.shape) for tensor in learned),
        "memory_parameters": sum(rows * width for name, (rows, width) in source.tables().items() if name in kept),
        "dropped": dict(plan.dropped),
    }


def _check_tokenizer(model: Path, sha256: str) -> None:
    """ExportError unless ``model`` is the file that the run was trained with."""
    try:
        found = record(model).sha256
    except OSError as error:
        raise ExportError(
            f"{model} cannot be read ({error}); name the prepared data of the run, or a copy, with --data"
        ) from None
    if found != sha256:
        raise ExportError(
            f"{model} is not the tokenizer that the run was trained with (its sha256 differs); name the prepared data of "
            "the run, or a copy, with --data"
        )


def _seal(folder: Path, report: dict[str, Any], records: Mapping[str, FileRecord]) -> None:
    """Write the report with the checksums of all files (``records``: those that are known), and flush everything."""
    files = sorted(path.name for path in folder.iterdir())
    report["files"] = {name: asdict(records.get(name) or record(folder / name)) for name in files}
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name in (*files, REPORT):
        fsync(folder / name)
    fsync(folder)


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / REPORT).is_file():
        raise ExportError(f"{out} holds something that is not an export; choose another directory")
    if not overwrite:
        raise ExportError(f"{out} already holds an export; choose another directory, or add --overwrite to replace it")


def _replace(temporary: Path, out: Path) -> None:
    """Give the finished directory its name; an earlier export of that name goes away last."""
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)
