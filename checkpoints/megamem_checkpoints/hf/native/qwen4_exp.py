"""A megamem model as a stock ``Qwen4ExpForCausalLM``, which transformers opens without modelling code from elsewhere.

Qwen4-Exp has what a plain decoder with Engram lacks: several residual streams that are mixed and injected, gated
attention, a sparse index of keys, a gated shared expert. With zero weights they do nothing but multiply by a power of two.
Its n-gram memory (PLE) is read at the entry of linear-attention layers only, so each Engram gets a carrier: a layer
inserted before its own whose attention and experts are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen4ExpTextConfig

from megamem.errors import ExportError
from megamem.memory.hashing import HashSpec, hash_specs
from megamem.memory.names import engram_table_name
from megamem_checkpoints.hf.mapping import Weight, map_names
from megamem_checkpoints.hf.native.memory_free import saved_shapes
from megamem_checkpoints.hf.native.qwen4_exp_conditions import conditions
from megamem_checkpoints.hf.native.qwen4_exp_config import qwen4_exp_config
from megamem_checkpoints.hf.native.qwen4_exp_rules import Change, Rules
from megamem_checkpoints.hf.plan import ExportPlan, PlannedTensor
from megamem_checkpoints.hf.source import PIECE_BYTES, Source

_SHARD_BYTES = 256 * 2**20


def plan(source: Source, *, table_files: int | None = None) -> ExportPlan:
    """The directory of a ``Qwen4ExpForCausalLM`` with the weights of ``source``, of which none is dropped.

    Args:
        source: A model that violates no condition (:func:`~.qwen4_exp_conditions.conditions`).
        table_files: Weight files that hold the tables and nothing else: each table is cut into as many ranges of rows.
            None cuts tables at 256 MiB and puts them among the other weights.

    Raises:
        ExportError: ``table_files`` is below 1, or conditions are violated: the message has all of them.
    """
    model, engram = source.model, source.memory.engram
    violated = conditions(model, source.memory, eos_id=source.eos_id)
    if violated:
        raise ExportError(
            "this model is no Qwen4-Exp, and what keeps it from being one cannot change after training; export it "
            "--to megamem:" + "".join(f"\n  - {one}" for one in violated)
        )
    if table_files is not None and table_files < 1:
        raise ExportError(f"table_files is {table_files}; set at least 1")
    tables = {engram_table_name(layer): spec for layer, spec in hash_specs(engram, model.vocab_size).items()}
    largest = max((math.prod(shape) for shape in source.tables().values()), default=1) * source.dtype.itemsize
    config = qwen4_exp_config(
        model,
        source.memory,
        eos_id=source.eos_id,
        seq_length=source.seq_length,
        dtype=source.dtype,
        table_shards=table_files or -(-largest // _SHARD_BYTES),
    )
    rules = Rules(model, engram)
    weights = map_names(source.shapes(), model)
    tensors = [*_dense(source, [weight for weight in weights if weight.source not in tables], rules)]
    for table in sorted(source.tables().keys() & tables.keys()):
        spec = tables[table]
        prefix = f"{rules.carrier(spec.layer)}.ple.ple_embedding."
        tensors += _hash(spec, prefix)
        tensors += _shards(source, table, prefix, config.split_ngram_parts, own_files=table_files is not None)
    expected = saved_shapes(config)
    planned = {tensor.name for tensor in tensors}
    null = {name: shape for name, shape in expected.items() if name not in planned and rules.is_null(name)}
    for name, shape in null.items():
        tensors.append(PlannedTensor(name, shape, source.dtype, (), partial(_zeros, shape, source.dtype)))
    learned = sum(math.prod(source.reader.shape(name)) for name in source.reader.names())
    exported = sum(math.prod(tensor.shape) for tensor in tensors if ".ple_embedding." not in tensor.name)
    return ExportPlan(
        config.model_type, config, tensors, expected, notes=_notes(config, exported / learned - 1), packs=False
    )


def _notes(config: Qwen4ExpTextConfig, growth: float) -> tuple[str, ...]:
    rounding = (
        "In bf16 the architecture rounds the scores of experts and memories to bf16, which training kept in fp32."
    )
    return (
        f"{len(config.ple_layer_ids)} of its {config.num_hidden_layers} layers do nothing but carry n-gram tables. Residual "
        "streams, key index, output gates and linear attention of the architecture have zero weights. All this adds "
        f"{growth:.1%} to the parameters beside the tables.",
        f"Attention reads every earlier token up to {config.indexer_budget:,} (`indexer_budget`) and leaves some out beyond.",
        "Give it one document per sequence: after an end-of-document token n-grams start afresh, but attention and the "
        "convolution of the n-gram memory go on, where training had them start afresh too.",
        *([rounding] if config.dtype == torch.bfloat16 else []),
        "Checked with transformers. Other engines that know the architecture, such as vLLM and SGLang, have not been tried.",
    )


def _dense(source: Source, weights: Sequence[Weight], rules: Rules) -> Iterator[PlannedTensor]:
    read = source.parts_reader(weight.source for weight in weights for _ in rules.native(weight.name))

    def pieces(weight: Weight, change: Change) -> Iterator[Tensor]:
        yield change(weight.part(read(weight.source))).to(source.dtype)

    for weight in weights:
        natives = rules.native(weight.name)
        empty = weight.part(torch.empty(source.reader.shape(weight.source), device="meta"))
        for native in natives:
            shape, content = tuple(native.change(empty).shape), partial(pieces, weight, native.change)
            yield PlannedTensor(native.name, shape, source.dtype, (weight.source,), content)


def _hash(spec: HashSpec, prefix: str) -> Iterator[PlannedTensor]:
    """The buffers that make transformers compute our row ids."""
    buffers: dict[str, np.ndarray] = {
        "layer_multipliers": spec.multipliers,
        "ngram_heads_vocab_sizes": spec.primes.ravel(),
        "ngram_heads_offsets": spec.offsets,
    }
    for name, values in buffers.items():
        tensor = torch.from_numpy(values.copy())
        yield PlannedTensor(prefix + name, tuple(tensor.shape), tensor.dtype, (), partial(_whole, tensor))


def _shards(source: Source, table: str, prefix: str, count: int, *, own_files: bool) -> Iterator[PlannedTensor]:
    """A table cut into ``count`` ranges of equally many rows; the last ones end with padding that no token reads."""
    rows, width = source.tables()[table]
    size = -(-rows // count)

    def pieces(start: int) -> Iterator[Tensor]:
        stop = min(start + size, rows)
        if start < stop:
            yield from source.table_pieces(table, source.dtype, start, stop)
        yield from _zeros((start + size - max(start, stop), width), source.dtype)

    for shard in range(count):
        yield PlannedTensor(
            f"{prefix}ngram_embedding.shard_{shard}.weight",
            (size, width),
            source.dtype,
            (table,),
            partial(pieces, shard * size),
            file=shard if own_files else None,
        )


def _whole(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    step = max(1, PIECE_BYTES // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield torch.zeros(min(step, shape[0] - start), *shape[1:], dtype=dtype)
