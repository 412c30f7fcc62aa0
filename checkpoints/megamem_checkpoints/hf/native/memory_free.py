"""A model without memories, or with a bank read along one fixed path, as stock Llama, Qwen3, Qwen3-MoE or Mixtral."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megamem.errors import ExportError
from megamem_checkpoints.hf.inherited import context_length, special_tokens
from megamem_checkpoints.hf.mapping import Weight, map_names
from megamem_checkpoints.hf.native.families import conditions, config_of, family_of
from megamem_checkpoints.hf.native.merge import MergedBank, block_rows
from megamem_checkpoints.hf.plan import ExportPlan, PlannedTensor
from megamem_checkpoints.hf.source import Source


def plan(source: Source, *, family: str = "", merge_path: str = "") -> ExportPlan:
    """The export of ``source`` as a ``family`` model (empty: the family that fits).

    Logits are the trainer's, in fp32 up to the order of sums. A bank is merged along ``merge_path`` (see
    :func:`~megamem_checkpoints.hf.native.merge.block_rows`): its blocks become hidden units of the feed-forward layers, whose
    width is one number, so layers without a bank gain units that are zero.

    ExportError with all conditions that the model does not meet.
    """
    model = source.model
    family = family or family_of(model)
    problems = [*conditions(family, model), *_memory_conditions(source, merge_path)]
    if problems:
        raise ExportError(
            f"the model is no {family} model: {'; '.join(problems)}; export it with `--to megamem`, which keeps everything"
        )
    bank = MergedBank(source, block_rows(merge_path, source.memory.bank)) if merge_path else None
    settings = special_tokens(source.meta) | {"dtype": source.dtype}
    if bank is not None:
        settings["intermediate_size"] = model.ffn_hidden_size + bank.units
    config = config_of(family, model, max_length=context_length(source.meta), **settings)
    weights = map_names(source.reader.names(), model, family)
    read = source.parts_reader(weight.source for weight in weights)

    def content(weight: Weight, tensor: Tensor) -> Tensor:
        part = weight.part(tensor)
        return bank.widen(weight.source, part) if bank is not None and bank.widens(weight.source) else part

    def pieces(weight: Weight) -> Iterator[Tensor]:
        yield content(weight, read(weight.source)).to(source.dtype)

    def planned(weight: Weight) -> PlannedTensor:
        empty = torch.empty(source.reader.shape(weight.source), device="meta")
        return PlannedTensor(
            name=weight.name,
            shape=tuple(content(weight, empty).shape),
            dtype=source.dtype,
            sources=(weight.source,),
            pieces=partial(pieces, weight),
        )

    return ExportPlan(
        model_type=family,
        config=config,
        tensors=[planned(weight) for weight in weights],
        expected=saved_shapes(config),
        dropped={
            table: f"its block on the path {merge_path} is merged, the others are left out" for table in source.tables()
        },
        notes=tuple(_notes(source, family, merge_path)),
    )


def _notes(source: Source, family: str, merge_path: str) -> Iterator[str]:
    if source.model.layernorm_zero_centered_gamma and source.dtype == torch.bfloat16:
        yield (
            f"Trained norms scale by 1 + weight, those of a {family} model by a bf16 number: scales are rounded by up to 0.4 %, so "
            "logits are not the trainer's. An export in fp32 (`--dtype fp32`) is exact to fp32's rounding, and a model that was "
            "trained with `model.layernorm_zero_centered_gamma=false` needs none."
        )
    if source.model.moe.layers and source.dtype == torch.bfloat16:
        yield (
            f"In bf16 a {family} model rounds the scores of experts to bf16, which training kept in fp32: a token whose experts "
            "score nearly the same may take other ones."
        )
    if merge_path:
        yield (
            f"The memory bank is read along one fixed path for every text ({merge_path}): its blocks are the last "
            f"{sum(source.memory.bank.units)} hidden units of the feed-forward layers."
        )


def _memory_conditions(source: Source, merge_path: str) -> Iterator[str]:
    engram, bank, moe = source.memory.engram, source.memory.bank, source.model.moe
    if engram.layers:
        yield f"memory.engram.layers is {engram.layers}, and it has no n-gram memory"
    if not bank.enabled:
        if merge_path:
            yield f"--merge-path is {merge_path}, and the model has no bank to merge"
        return
    if not merge_path:
        yield (
            "it has no bank of blocks fetched by document; merge those of one path with --merge-path, such as generic or "
            f"{','.join(['0'] * bank.levels)}"
        )
    experts = sorted(set(moe.layers) & set(bank.layers or range(source.model.num_layers)))
    if experts:
        yield (
            f"the bank widens layer {experts[0]}, a mixture of experts without a dense part that its blocks could widen "
            "(memory.bank.layers would have to leave out model.moe.layers)"
        )


def saved_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a directory that ``save_pretrained`` writes for a model of ``config``."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = revert_weight_conversion(model, model.state_dict())  # experts are stacked in memory and apart on disk
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
