"""The model of a pipeline stage."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.models.attention import choose_backend
from megamem.models.checks import check_model
from megamem.models.config import ModelConfig
from megamem.models.init import initialize_weights
from megamem.models.rotary import PartRotaryEmbedding
from megamem.models.specs import block_spec, transformer_config
from megamem.parallel.groups import Groups
from megamem.train.config import Recompute


def build_model(
    model: ModelConfig,
    memory: MemoryConfig,
    *,
    groups: Groups,
    seq_length: int,
    dtype: torch.dtype,
    seed: int,
    sequence_parallel: bool,
    recompute: Recompute = "none",
    chunk: int = 0,
    device: torch.device | str | None = None,
) -> GPTModel:
    """megatron-core's ``GPTModel`` for this rank's pipeline stage, initialised, on ``groups.device``; with virtual stages
    (``groups.layout.vpp``) for one chunk of its layers. The chunks of a stage belong together in a ``ModuleList``.

    ``model(input_ids, position_ids, None, labels=..., packed_seq_params=MicroContext)`` with ``[b, s]`` int64 ids
    gives, in the last chunk of the last stage, the loss of each token, ``[b, s]`` fp32. Without labels it gives logits
    ``[b, s, padded vocabulary]``, of which a tensor-parallel rank holds its slice unless ``runtime_gather_output=True``.
    Earlier chunks give hidden states ``[s, b, h]``. Under context parallelism ids, labels and results are those of the
    context's :attr:`~megamem.models.micro.MicroContext.positions`.

    ``device="meta"`` gives shapes without memory or weights. ConfigError where the model does not fit the layout.
    """
    if model.vocab_size < 1:
        raise ConfigError("model.vocab_size is 0; set it to the number of entries of the tokenizer")
    check_model(model, memory, groups.layout, seq_length=seq_length, sequence_parallel=sequence_parallel)
    device = groups.device if device is None else torch.device(device)
    layout = groups.layout
    config = transformer_config(model, layout, dtype=dtype, sequence_parallel=sequence_parallel, recompute=recompute)
    layers = layout.chunk_layers(model.num_layers, groups.coordinates.pp, chunk)
    spec = block_spec(
        model,
        memory,
        layers,
        attention_backend=choose_backend(model, groups.device, dtype),
    )
    with device:
        gpt = GPTModel(
            config,
            spec,
            vocab_size=model.padded_vocab_size,
            max_sequence_length=seq_length,
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == layout.vpp - 1,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,  # annotated int, used as a number
            rope_scaling=model.rope_scaling_factor != 1,
            rope_scaling_factor=model.rope_scaling_factor,
            vp_stage=chunk if layout.vpp > 1 else None,
        )
    built = [layer.layer_number - 1 for layer in gpt.decoder.layers]
    if built != list(layers):
        raise RuntimeError(f"megatron-core built the layers {built} where the layout {layout} has {list(layers)}")
    if layout.etp != layout.tp:
        _mark_experts(gpt)
    if layout.cp > 1:
        gpt.rotary_pos_emb = PartRotaryEmbedding(gpt.rotary_pos_emb, groups.cp)
    if device.type == "meta":
        return gpt.to(device)  # megatron puts some buffers on the device it runs on
    initialize_weights(gpt, model, groups, seed=seed)
    return gpt


def _mark_experts(gpt: GPTModel) -> None:
    """Reduce experts over the ranks that hold the same ones: megatron asks for it only under expert parallelism, but a
    tensor parallelism of their own makes these ranks others than the data-parallel ones too.
    """
    for name, parameter in gpt.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
