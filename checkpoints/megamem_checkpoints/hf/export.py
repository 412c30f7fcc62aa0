"""A checkpoint as a Hugging Face model directory: weights, configuration, tokenizer, modelling code, model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megamem.config.base import build
from megamem.errors import ExportError
from megamem.files import fsync
from megamem.memory.config import MemoryConfig
from megamem.memory.folding import fold_from_sentencepiece
from megamem.models.config import ModelConfig
from megamem_checkpoints.files import record
from megamem_checkpoints.hf import remote_code
from megamem_checkpoints.hf.card import model_card
from megamem_checkpoints.hf.configure import hf_config
from megamem_checkpoints.hf.mapping import Weight, check_complete, map_names
from megamem_checkpoints.hf.remote_code.configuration_megamem import MegamemConfig
from megamem_checkpoints.hf.remote_code.modeling_megamem import MegamemForCausalLM
from megamem_checkpoints.hf.tokenizer import check_ids, export_tokenizer
from megamem_checkpoints.hf.verify import REPORT, verify_in_new_process

_CODE = ("configuration_megamem.py", "modeling_megamem.py")
_FP32 = (
    "e_score_correction_bias",
    "memory_router.",
)  # choices between near-equal scores, whatever the dtype of the rest
_CHUNK_BYTES = 64 * 2**20


class Reader(Protocol):
    """What an export needs of :class:`~megamem_checkpoints.reader.CheckpointReader`."""

    @property
    def step(self) -> int: ...

    @property
    def meta(self) -> dict[str, Any]: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...

    def tables(self) -> dict[str, tuple[int, int]]: ...

    def rows(self, table: str, start: int, stop: int) -> Tensor: ...

    def verify(self) -> None: ...


def export_checkpoint(
    reader: Reader,
    out: Path,
    *,
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

    It appears whole or not at all, and only after its checks have passed. Returns the content of ``export.json``.

    Args:
        origin: name of the checkpoint, for the record.
        dtype: of the parameters; ``auto`` is bf16 for a run that trained in bf16, else fp32. The router of
            prompts and the selection biases of experts stay fp32.
        tokenizer_model: sentencepiece model; None takes the one in the run's prepared data.
        clusters: cluster tree of the documents, for models with a bank; None takes the one in the run's prepared data.
        sample: texts on which the tokenizer is compared with sentencepiece, beside built-in ones.
        license: identifier for the model card, such as ``apache-2.0``; empty leaves it unspecified.
        max_shard_size: upper bound of one weight file, in bytes or like ``"5GB"``; a larger tensor gets a file of its
            own. One file is held in memory at a time.
        overwrite: replace an earlier export at ``out``.
        verify: check the checkpoint's checksums, then load the export in a new process and compare cached with
            uncached inference.

    Raises:
        ExportError: ``out`` is in the way, the checkpoint does not fit its own configuration, the tokenizer cannot be
            reproduced, or a check failed.
        CheckpointError: a file of the checkpoint is damaged.
    """
    out = out.resolve()
    _refuse_to_replace(out, overwrite)
    meta = reader.meta
    data = Path(meta["config"]["data"]["path"])
    tokenizer_model = tokenizer_model or data / "tokenizer.model"
    _check_tokenizer(tokenizer_model, meta["tokenizer_sha256"])
    if verify:
        reader.verify()
    temporary = out.with_name(f".{out.name}.exporting")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # First: transformers asks about remote code where a tokenizer lies beside a configuration that has some.
        tokenizer = export_tokenizer(tokenizer_model, temporary, max_length=meta["config"]["data"]["seq_length"])
        checks: dict[str, Any] = {"tokenizer_texts": check_ids(tokenizer, tokenizer_model, sample)}
        report = {"origin": origin, "step": reader.step, "checks": checks}
        clusters = clusters or data / "clusters.safetensors"
        report |= _fill(temporary, reader, dtype, tokenizer_model, clusters, max_shard_size)
        (temporary / "README.md").write_text(model_card(meta, report, license=license), encoding="utf-8")
        if verify:
            checks |= verify_in_new_process(temporary)
        _seal(temporary, report)
        _replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out} cannot be written ({error}); free space there or choose another directory") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _fill(
    folder: Path, reader: Reader, dtype: str, tokenizer_model: Path, clusters: Path, max_shard_size: int | str
) -> dict[str, Any]:
    """Write everything but tokenizer, card and report."""
    from transformers import GenerationConfig

    memory = build(MemoryConfig, reader.meta["config"]["memory"])
    model = build(ModelConfig, reader.meta["config"]["model"])
    extra: dict[str, Tensor] = {}
    fold = None
    if memory.engram.layers and memory.engram.fold_tokens:
        fold = fold_from_sentencepiece(tokenizer_model)
        extra["model.token_fold"] = torch.from_numpy(fold)
    if memory.bank.enabled:
        extra |= _router_tensors(
            clusters, memory.bank.levels, model.vocab_size, tokenizer_sha256=reader.meta["tokenizer_sha256"]
        )
    dimensions = len(extra.get("memory_router.components", ()))
    config = hf_config(reader.meta, fold=fold, router_dimensions=dimensions)
    if dtype != "auto":
        config.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32

    shapes = {name: reader.shape(name) for name in reader.names()} | reader.tables()
    weights = map_names(shapes, model)
    produced = {weight.name: torch.empty(shapes[weight.source], device="meta") for weight in weights}
    produced = {weight.name: weight.part(produced[weight.name]) for weight in weights} | {
        name: tensor.to("meta") for name, tensor in extra.items()
    }
    check_complete({name: tuple(t.shape) for name, t in produced.items()}, _expected(config))
    produced = {name: t.to(_dtype(name, t, config.dtype)) for name, t in produced.items()}
    _write_weights(folder, produced, _loader(reader, weights, extra), max_shard_size)

    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(folder)
    for name in _CODE:
        shutil.copyfile(Path(remote_code.__path__[0]) / name, folder / name)
    return {
        "dtype": str(config.dtype).removeprefix("torch."),
        "parameters": sum(produced[weight.name].numel() for weight in weights if not _stays_fp32(weight.name)),
        "memory_parameters": sum(rows * width for rows, width in reader.tables().values()),
    }


def _expected(config: MegamemConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of everything the modelling code saves."""
    with torch.device("meta"):
        tensors = MegamemForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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


def _router_tensors(clusters: Path, levels: int, vocab_size: int, *, tokenizer_sha256: str) -> dict[str, Tensor]:
    """What routes a prompt to blocks; nothing where documents were clustered with a sentence encoder.

    The tree may be deeper than the bank, and the vocabulary of the model larger than the tokenizer's.
    """
    try:
        with safe_open(clusters, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("tokenizer_sha256") != tokenizer_sha256:
                raise ExportError(
                    f"{clusters} is no cluster tree of the run's tokenizer; name the one that the run's data was "
                    "prepared with"
                )
            if metadata.get("encoder"):
                return {}
            names = ["idf", "components", *(f"level{level}.centroids" for level in range(1, levels + 1))]
            tensors = {f"memory_router.{name.replace('.', '_')}": file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{clusters} cannot be read ({error}); name the cluster tree that the run's data was prepared with"
        ) from None
    for name in ("memory_router.idf", "memory_router.components"):
        tensors[name] = F.pad(tensors[name], (0, vocab_size - tensors[name].shape[-1]))
    return tensors


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if _stays_fp32(name) else dtype


def _stays_fp32(name: str) -> bool:
    return any(part in name for part in _FP32)


def _loader(
    reader: Reader, weights: Sequence[Weight], extra: Mapping[str, Tensor]
) -> Callable[[str, torch.dtype], Tensor]:
    """Reads one exported tensor by name, in a dtype."""
    by_name = {weight.name: weight for weight in weights}
    tables = reader.tables()
    dense = lru_cache(maxsize=1)(reader.tensor)  # queries, keys and values are parts of one tensor, and neighbours

    def load(name: str, dtype: torch.dtype) -> Tensor:
        if name in extra:
            return extra[name].to(dtype)
        weight = by_name[name]
        if weight.source in tables:
            return _table(reader, weight.source, dtype)
        return weight.part(dense(weight.source)).to(dtype).contiguous()

    return load


def _table(reader: Reader, name: str, dtype: torch.dtype) -> Tensor:
    """A whole table, read range by range so that fp32 rows never exist all at once."""
    rows, width = reader.tables()[name]
    table = torch.empty(rows, width, dtype=dtype)
    step = max(1, _CHUNK_BYTES // (4 * width))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        table[start:stop] = reader.rows(name, start, stop)
    return table


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], load: Callable[[str, torch.dtype], Tensor], max_shard_size: int | str
) -> None:
    """Write the tensors that ``tensors`` describes on the meta device, one file at a time."""
    try:
        plan = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ExportError(f"max_shard_size is {max_shard_size!r}; set bytes, or a size such as 5GB") from error
    for file, names in plan.filename_to_tensors.items():
        save_file({name: load(name, tensors[name].dtype) for name in names}, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "tokenizer.json", folder / file)  # safetensors shuts out everyone but the owner
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _seal(folder: Path, report: dict[str, Any]) -> None:
    """Write the report with the checksums of all files, and flush everything."""
    files = sorted(path.name for path in folder.iterdir())
    report["files"] = {name: {"bytes": (r := record(folder / name)).bytes, "sha256": r.sha256} for name in files}
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
