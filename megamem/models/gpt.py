"""The model of one pipeline stage."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.models.attention import choose_backend
from megamem.models.checks import check_model
from megamem.models.config import ModelConfig
from megamem.models.init import initialize_weights
from megamem.models.specs import block_spec, transformer_config
from megamem.parallel.groups import Groups


def build_model(
    model: ModelConfig,
    memory: MemoryConfig,
    *,
    groups: Groups,
    seq_length: int,
    dtype: torch.dtype,
    seed: int,
    sequence_parallel: bool,
    device: torch.device | str | None = None,
) -> GPTModel:
    """megatron-core's ``GPTModel`` for this rank's pipeline stage, initialised, on ``groups.device``.

    ``model(input_ids, position_ids, None, labels=..., packed_seq_params=MicroContext)`` with ``[b, s]`` int64 ids
    gives, on the last stage, the loss of each token, ``[b, s]`` fp32. Without labels it gives logits ``[b, s, padded
    vocabulary]``, of which a tensor-parallel rank holds its slice unless ``runtime_gather_output=True``. Earlier stages
    give hidden states ``[s, b, h]``.

    ``device="meta"`` gives shapes without memory or weights. ConfigError where the model does not fit the layout.
    """
    if model.vocab_size < 1:
        raise ConfigError("model.vocab_size is 0; set it to the number of entries of the tokenizer")
    check_model(model, memory, groups.layout, seq_length=seq_length, sequence_parallel=sequence_parallel)
    device = groups.device if device is None else torch.device(device)
    config = transformer_config(model, groups.layout, dtype=dtype, sequence_parallel=sequence_parallel)
    spec = block_spec(
        model,
        memory,
        groups.layout,
        stage=groups.coordinates.pp,
        attention_backend=choose_backend(model, groups.device, dtype),
    )
    with device:
        gpt = GPTModel(
            config,
            spec,
            vocab_size=model.padded_vocab_size,
            max_sequence_length=seq_length,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,  # annotated int, used as a number
        )
    if device.type == "meta":
        return gpt.to(device)  # megatron puts some buffers on the device it runs on
    initialize_weights(gpt, model, groups, seed=seed)
    return gpt
