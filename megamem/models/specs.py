"""The backbone and its memories as megatron-core module specs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.memory.config import MemoryConfig
from megamem.models.attention import CoreAttention
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.layer import MemoryTransformerLayer, MemoryTransformerLayerSubmodules
from megamem.models.norm import RMSNorm
from megamem.parallel.layout import Layout
from megamem.train.config import Recompute


def transformer_config(
    model: ModelConfig, layout: Layout, *, dtype: torch.dtype, sequence_parallel: bool, recompute: Recompute = "none"
) -> TransformerConfig:
    """megatron-core's configuration of ``model``. Weights stay uninitialised: :mod:`megamem.models.init` draws them.

    It is not told of context parallelism, for which megatron divides sequences in another way: core attention and
    :class:`~megamem.models.rotary.PartRotaryEmbedding` know the group.
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.layernorm_zero_centered_gamma,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,  # keeps the input of SwiGLU alone for backward
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        perform_initialization=False,
        use_cpu_initialization=True,  # allocate where the caller's device context says, the meta device included
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers or None,
        # Of two stages the last one follows from the first: told both, megatron divides by the number of stages between.
        num_layers_in_last_pipeline_stage=(
            None if layout.pp == 2 and layout.first_stage_layers else layout.last_stage_layers or None
        ),
        **(_interleaving_settings(layout) if layout.vpp > 1 else {}),
        **_recompute_settings(recompute),
        **(_moe_settings(model) if model.moe.layers else {}),
    )


def _interleaving_settings(layout: Layout) -> dict[str, object]:
    return {
        "virtual_pipeline_model_parallel_size": layout.vpp,
        # Activations and gradients travel in messages of their own: of two stages each is the next and the previous one of
        # the other, and a batch of both kinds would be mixed up on arrival.
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _recompute_settings(recompute: Recompute) -> dict[str, object]:
    """``selective`` names the core attention; :class:`MemoryTransformerLayer` adds the memories."""
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _moe_settings(model: ModelConfig) -> dict[str, object]:
    """Routing weights of a token, as the export must reproduce them (``k = router_topk``, logits in fp32):

    - ``softmax_aux_loss``: softmax over all experts, the ``k`` largest, renormalised to sum 1 (computed as a softmax of
      the ``k`` largest logits, which is the same). For ``k = 1`` the softmax score itself: 1 would have no gradient.
    - ``sigmoid_bias``: sigmoid scores; the ``k`` experts with the largest ``score + expert_bias``; their scores,
      without the bias, divided by their sum (plus 1e-20). For ``k = 1`` the sigmoid score itself.

    There is no scaling factor and no capacity limit: no token is dropped. The shared expert is added without a gate.
    """
    moe = model.moe
    sigmoid = moe.router == "sigmoid_bias"
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_expert_hidden_size or None,
        "moe_layer_freq": [int(layer in moe.layers) for layer in range(model.num_layers)],
        "moe_router_topk": moe.router_topk,
        "moe_router_dtype": "fp32",
        "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
        "moe_router_pre_softmax": moe.router_topk == 1 and not sigmoid,
        "moe_router_load_balancing_type": "none" if sigmoid else "aux_loss",
        "moe_aux_loss_coeff": 0.0 if sigmoid else moe.aux_loss_coeff,
        "moe_router_enable_expert_bias": sigmoid,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_token_dispatcher_type": moe.token_dispatcher,
    }


def block_spec(
    model: ModelConfig, memory: MemoryConfig, layers: range, *, attention_backend: str
) -> TransformerBlockSubmodules:
    """Specs of ``layers``, zero-based over the whole model, and of the final norm."""
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, memory, layer, attention_backend) for layer in layers], layer_norm=RMSNorm
    )


def _layer_spec(model: ModelConfig, memory: MemoryConfig, layer: int, attention_backend: str) -> ModuleSpec:
    return ModuleSpec(
        module=MemoryTransformerLayer,
        submodules=MemoryTransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_attention_spec(model, attention_backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_moe_spec(model.moe) if layer in model.moe.layers else _mlp_spec(model.ffn_hidden_size),
            mlp_bda=get_bias_dropout_add,
            engram=_engram_spec(memory, layer),
            bank=_bank_spec(memory, layer),
        ),
    )


def _attention_spec(model: ModelConfig, backend: str) -> ModuleSpec:
    head_norm = ModuleSpec(module=RMSNorm, params={"per_head": True}) if model.qk_layernorm else None
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(CoreAttention, backend=backend),
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _mlp_submodules() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _mlp_spec(ffn_hidden_size: int) -> ModuleSpec:
    return ModuleSpec(module=MLP, params={"ffn_hidden_size": ffn_hidden_size}, submodules=_mlp_submodules())


def _moe_spec(moe: MoEConfig) -> ModuleSpec:
    shared = ModuleSpec(module=SharedExpertMLP, submodules=_mlp_submodules())
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=SequentialMLP, submodules=_mlp_submodules()),
            shared_experts=shared if moe.shared_expert_hidden_size else None,
        ),
    )


def _engram_spec(memory: MemoryConfig, layer: int) -> ModuleSpec | None:
    if layer not in memory.engram.layers:
        return None
    from megamem.models.engram import Engram

    return ModuleSpec(module=Engram, params={"engram": memory.engram, "layer": layer})


def _bank_spec(memory: MemoryConfig, layer: int) -> ModuleSpec | None:
    if not memory.bank.enabled or (memory.bank.layers and layer not in memory.bank.layers):
        return None
    from megamem.models.bank import Bank

    return ModuleSpec(module=Bank, params={"bank": memory.bank, "layer": layer})
