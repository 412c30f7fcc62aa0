"""Memory-free architectures that transformers knows: which models they fit, and their configurations in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megamem.errors import ExportError
from megamem.models.config import ModelConfig, MoEConfig
from megamem_checkpoints.hf.configure import rope_parameters

FAMILIES = ("llama", "qwen3", "qwen3_moe", "mixtral")
"""Values of ``model_type``. Mixtral is Llama with experts in every layer, the Qwen3 pair has QK-norm."""

_MOE = ("qwen3_moe", "mixtral")
_QK_NORM = ("qwen3", "qwen3_moe")


def family_of(model: ModelConfig) -> str:
    """The family that comes closest to ``model``: the one that it fits, if it fits any."""
    if model.moe.layers:
        return "qwen3_moe" if model.qk_layernorm else "mixtral"
    return "qwen3" if model.qk_layernorm else "llama"


def conditions(family: str, model: ModelConfig) -> list[str]:
    """What keeps the backbone of ``model`` from being a ``family`` model: one sentence per setting; none where it fits."""
    moe = model.moe
    found = []
    if model.qk_layernorm != (family in _QK_NORM):
        needed = str(family in _QK_NORM).lower()
        found.append(f"model.qk_layernorm is {str(model.qk_layernorm).lower()} and would have to be {needed}")
    if family not in _MOE and moe.layers:
        found.append(f"model.moe.layers is {moe.layers} and would have to be empty")
    if family == "mixtral" and len(moe.layers) < model.num_layers:
        found.append("model.moe.layers would have to name every layer")
    if family == "mixtral" and moe.layers and moe.router_topk == 1:
        found.append(
            "model.moe.router_topk is 1, where Mixtral gives every expert weight 1, and would have to be 2 or more"
        )
    if moe.layers and moe.router != "softmax_aux_loss":
        found.append(f"model.moe.router is {moe.router} and would have to be softmax_aux_loss")
    if moe.layers and moe.shared_expert_hidden_size:
        found.append(
            f"model.moe.shared_expert_hidden_size is {moe.shared_expert_hidden_size} and would have to be 0, without a shared "
            "expert"
        )
    if family == "llama" and model.hidden_size % model.num_attention_heads:
        found.append("model.hidden_size would have to be a multiple of model.num_attention_heads")
    return found


def config_of(family: str, model: ModelConfig, *, max_length: int, **settings: Any) -> Any:
    """The ``PreTrainedConfig`` of a model that meets the :func:`conditions`; ``settings`` (special tokens, ...) come on top."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    moe = model.moe
    common: dict[str, Any] = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": max_length,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope_parameters(model),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }
    if family == "qwen3_moe":
        common |= {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.router_topk,
            "moe_intermediate_size": moe.ffn_hidden_size,
            "norm_topk_prob": moe.router_topk > 1,
            "mlp_only_layers": sorted(set(range(model.num_layers)) - set(moe.layers)),
            "router_aux_loss_coef": moe.aux_loss_coeff,
        }
    elif family == "mixtral":
        common |= {
            "intermediate_size": moe.ffn_hidden_size,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.router_topk,
            "router_aux_loss_coef": moe.aux_loss_coeff,
        }
    return AutoConfig.for_model(family, **common | settings)


def model_of(config: Any, *, make_vocab_size_divisible_by: int = 128) -> ModelConfig:
    """The ``model`` section of a ``PreTrainedConfig`` of one of :data:`FAMILIES`.

    ExportError where transformers computes something for it that megamem does not; ConfigError where its numbers do not fit
    each other.
    """
    problems = list(_unsupported(config))
    if problems:
        raise ExportError(f"this {config.model_type} model cannot be imported: {'; '.join(problems)}")
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim,
        vocab_size=config.vocab_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        rotary_base=float(rope["rope_theta"]),
        rope_scaling_factor=float(rope["factor"]) if rope["rope_type"] == "llama3" else 1.0,
        norm_epsilon=config.rms_norm_eps,
        layernorm_zero_centered_gamma=False,
        qk_layernorm=config.model_type in _QK_NORM,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        init_method_std=config.initializer_range,
        moe=_moe_of(config),
    )


def _moe_of(config: Any) -> MoEConfig:
    layers = _moe_layers(config)
    if not layers:
        return MoEConfig()
    mixtral = config.model_type == "mixtral"
    return MoEConfig(
        layers=layers,
        num_experts=config.num_local_experts if mixtral else config.num_experts,
        router_topk=config.num_experts_per_tok,
        ffn_hidden_size=config.intermediate_size if mixtral else config.moe_intermediate_size,
        aux_loss_coeff=float(config.router_aux_loss_coef),
    )


def _moe_layers(config: Any) -> list[int]:
    layers = range(config.num_hidden_layers)
    if config.model_type == "mixtral":
        return list(layers)
    if config.model_type != "qwen3_moe" or not config.num_experts:
        return []
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers)
    return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]


def _unsupported(config: Any) -> Iterator[str]:
    """What of a configuration has no counterpart here."""
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantised (quantization_config); take the checkpoint that it was made from"
    if config.hidden_act != "silu":
        yield f"hidden_act is {config.hidden_act!r}, and only SwiGLU (silu) is known"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            yield f"{name} is true, and projections have no biases here"
    if getattr(config, "sliding_window", None) is not None or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        yield f"attention is limited to a sliding window (sliding_window={config.sliding_window}), and here it sees everything"
    yield from _unsupported_rope(config.rope_parameters)
    if not _moe_layers(config):
        return
    topk = config.num_experts_per_tok
    normalised = getattr(config, "norm_topk_prob", True)
    if normalised != (topk > 1):
        yield (
            f"num_experts_per_tok is {topk} with norm_topk_prob={normalised}, and here the weights of the chosen experts are "
            "normalised exactly where there are several"
        )


def _unsupported_rope(rope: dict[str, Any]) -> Iterator[str]:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        yield f"rope_type is {kind!r}, and 'default' and 'llama3' are known"
    elif kind == "llama3":
        known = rope_parameters(ModelConfig(rope_scaling_factor=2.0))  # a factor of any size brings the constants
        for name in sorted(known.keys() - {"rope_type", "rope_theta", "factor"}):
            if rope.get(name) != known[name]:
                yield f"rope_parameters.{name} is {rope.get(name)}, and Llama 3.1's {known[name]:g} is known alone"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor is {rope['partial_rotary_factor']}, and here RoPE turns whole heads"
