"""The export that keeps everything: model type ``megamem``, with its modelling code in the directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamem.errors import ExportError
from megamem.memory.folding import fold_from_tokenizer
from megamem_checkpoints.hf import remote_code
from megamem_checkpoints.hf.configure import hf_config
from megamem_checkpoints.hf.mapping import Weight, map_names
from megamem_checkpoints.hf.plan import ExportPlan, PlannedTensor
from megamem_checkpoints.hf.remote_code.configuration_megamem import MegamemConfig
from megamem_checkpoints.hf.remote_code.modeling_megamem import MegamemForCausalLM
from megamem_checkpoints.hf.source import Source
from megamem_kernels.formats import ROWS, SCALES, FormatName, row_fields
from megamem_kernels.rounding import quantize_rows

_FP32 = (
    "e_score_correction_bias",
    "memory_router.",
)  # choices between near-equal scores, whatever the dtype of the rest
_DTYPES: dict[FormatName, str] = {"fp8": "float8_e4m3fn", "bf16": "bfloat16", "fp32": "float32"}
"""From the narrowest: each format holds all values of those before it."""
_FIELDS = {ROWS: "weight", SCALES: "scale"}


def plan(
    source: Source,
    *,
    table_files: int | None = None,
    table_format: Literal["auto", "fp32", "bf16", "fp8"] = "auto",
) -> ExportPlan:
    """The directory of a ``MegamemForCausalLM`` with the weights of ``source``.

    Args:
        source: Any model of ours.
        table_files: Weight files that hold the tables and nothing else: each table is cut into as many ranges of rows.
            None leaves every table in one piece, among the other weights.
        table_format: Of rows; ``fp8`` is E4M3 with one ue8m0 scale per 32 values. ``auto`` keeps what the run stores,
            bit for bit, or the widest of its formats where tables of a kind differ.

    Raises:
        ExportError: ``table_files`` is below 1, tensors that no rule knows, or no cluster tree of the run's tokenizer.
    """
    if table_files is not None and table_files < 1:
        raise ExportError(f"table_files is {table_files}; set at least 1")
    constants = _constants(source)
    fold = constants.get("model.token_fold")
    weights = map_names(source.shapes(), source.model)
    tables = [weight for weight in weights if weight.source in source.tables()]
    formats = {kind: _format(source, tables, kind, table_format) for kind in ("engram", "bank")}
    config = hf_config(
        source.meta,
        fold=None if fold is None else fold.numpy(),
        router_dimensions=len(constants.get("memory_router.components", ())),
        dtype=source.dtype,
        table_shards=table_files or 1,
        **{f"{kind}_table_dtype": _DTYPES[name] for kind, name in formats.items()},
    )
    tensors = [
        *_dense(source, [weight for weight in weights if weight.source not in source.tables()]),
        *(PlannedTensor(name, tuple(t.shape), t.dtype, (), partial(_once, t)) for name, t in constants.items()),
    ]
    for weight in tables:
        name = formats["bank" if ".bank." in weight.source else "engram"]
        tensors += _table(source, weight, name, table_files)
    folder = Path(remote_code.__path__[0])
    code = tuple(folder / f"{module}_megamem.py" for module in ("configuration", "modeling", "table"))
    return ExportPlan("megamem", config, tensors, _expected(config), code=code)


def _once(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor


def _dense(source: Source, weights: Sequence[Weight]) -> Iterator[PlannedTensor]:
    read = source.parts_reader(weight.source for weight in weights)

    def content(weight: Weight, dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
        return lambda: _once(weight.part(read(weight.source)).to(dtype))

    for weight in weights:
        shape = weight.part(torch.empty(source.reader.shape(weight.source), device="meta")).shape
        dtype = torch.float32 if any(part in weight.name for part in _FP32) else source.dtype
        yield PlannedTensor(weight.name, tuple(shape), dtype, (weight.source,), content(weight, dtype))


def _table(source: Source, weight: Weight, name: FormatName, files: int | None) -> Iterator[PlannedTensor]:
    """The tensors of one table: a range of rows and, in fp8, its scales, for each of the shards."""
    rows, width = source.tables()[weight.source]
    count = min(files or 1, rows)

    def content(field: str, start: int, stop: int) -> Callable[[], Iterator[Tensor]]:
        return lambda: (fields[field] for fields in _rows(source, weight.source, name, start, stop))

    for shard in range(count):
        start, stop = shard * rows // count, (shard + 1) * rows // count
        for field in row_fields(name, width):
            yield PlannedTensor(
                f"{weight.name.removesuffix('.weight')}.shard_{shard}.{_FIELDS[field.name]}",
                (stop - start, *field.shape),
                field.dtype,
                (weight.source,),
                content(field.name, start, stop),
                file=None if files is None else shard,
            )


def _rows(source: Source, table: str, name: FormatName, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
    """Rows ``[start, stop)`` in a format: copied where it is the run's, else rounded to nearest."""
    if source.reader.format(table) == name:
        yield from source.stored_pieces(table, start, stop)
        return
    for values in source.table_pieces(table, torch.float32, start, stop):
        fields = {field.name: field.allocate(len(values)) for field in row_fields(name, values.shape[1])}
        quantize_rows(values, fields)
        yield fields


def _format(source: Source, tables: Sequence[Weight], kind: str, asked: str) -> FormatName:
    """The format of the tables of a kind."""
    found = {source.reader.format(table.source) for table in tables if f".{kind}." in table.source}
    return next((name for name in reversed(_DTYPES) if name == asked or (asked == "auto" and name in found)), "fp32")


def _expected(config: MegamemConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of everything the modelling code saves."""
    with torch.device("meta"):
        tensors = MegamemForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _constants(source: Source) -> dict[str, Tensor]:
    """Tensors of the exported model that the checkpoint does not hold: they come from the prepared data."""
    engram, bank = source.memory.engram, source.memory.bank
    constants: dict[str, Tensor] = {}
    if engram.layers and engram.fold_tokens:
        constants["model.token_fold"] = torch.from_numpy(
            fold_from_tokenizer(source.tokenizer, vocab_size=source.vocab_size)
        )
    if bank.enabled:
        constants |= _router(source.clusters, bank.levels, source.vocab_size, source.meta["tokenizer_sha256"])
    return constants


def _router(clusters: Path, levels: int, vocab_size: int, tokenizer_sha256: str) -> dict[str, Tensor]:
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
