"""What the routers of a mixture of experts need once per optimizer step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker, get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from megamem.models.chunks import model_chunks
from megamem.parallel.groups import Groups

_LOSS = "load_balancing_loss"  # megatron's name of the auxiliary loss in its tracker


@torch.no_grad()
def update_router_bias(model: nn.Module, *, discard: bool = False) -> None:
    """Move the selection biases of ``sigmoid_bias`` routers by one step, after each optimizer step.

    Up where an expert got fewer tokens of the global batch than the average, down where it got more (arXiv 2408.15664,
    algorithm 1). ``discard``: forget the counts and leave the biases, for a step that is skipped. Collective over the
    pipeline stage unless ``discard`` is set; does nothing in a stage without such routers.
    """
    routers = [module for module in model.modules() if isinstance(module, TopKRouter) and module.enable_expert_bias]
    if not routers:
        return
    if not discard:
        counts = torch.stack([router.local_tokens_per_expert for router in routers])
        biases = torch.stack([router.expert_bias for router in routers])
        rate = routers[0].config.moe_router_bias_update_rate
        updated = get_updated_expert_bias(counts, biases, rate)
        for router, bias in zip(routers, updated, strict=True):
            router.expert_bias.copy_(bias)
    for router in routers:
        router.local_tokens_per_expert.zero_()


@torch.no_grad()
def take_aux_loss(model: nn.Module, groups: Groups, *, micro_batches: int) -> float:
    """Load-balancing loss of the last step, averaged over layers, micro-batches and data-parallel ranks.

    Without its coefficient: 1 is perfect balance, ``num_experts / router_topk`` the worst case. 0 for a model without
    this loss. Collective over the world; megatron accumulates it until it is taken.
    """
    config = model_chunks(model)[0].config
    if not config.num_moe_experts or config.moe_router_load_balancing_type != "aux_loss":
        return 0.0
    tracked = get_moe_layer_wise_logging_tracker().pop(_LOSS, None)
    total = torch.zeros(1, device=groups.device) if tracked is None else tracked["values"].sum().view(1)
    dist.all_reduce(total, group=groups.world)  # stages hold different layers, tensor-parallel ranks different tokens
    return total.item() / (sum(config.moe_layer_freq) * micro_batches * groups.layout.dp)
