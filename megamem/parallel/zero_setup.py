"""How DeepSpeed is set up for megatron-core models: its groups, its settings and the engine that ``zero.py`` drives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from megamem.parallel import cpu, gradients
from megamem.parallel.groups import Groups

cpu.prepare_deepspeed()

import deepspeed  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine  # noqa: E402
from deepspeed.utils import groups as deepspeed_groups  # noqa: E402


@dataclass(frozen=True, slots=True)
class PartitionGroups:
    """Ranks over which DeepSpeed averages gradients and splits optimizer state."""

    dense: dist.ProcessGroup
    expert: dist.ProcessGroup
    owned: tuple[dist.ProcessGroup, ...] = ()
    """Made for these, and not of megatron's."""

    @classmethod
    def of_stage(cls, stage: int, groups: Groups) -> PartitionGroups:
        """All replicas of a parameter. Stage 0 splits nothing: this rank alone, and ZeroEngine averages over the replicas."""
        if stage:
            return cls(groups.dp_cp, groups.expert_dp)
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return cls(alone, alone, owned=(alone,))

    def close(self) -> None:
        """Destroy the groups that were made for these."""
        for group in self.owned:
            dist.destroy_process_group(group)


def create_engine(
    module: nn.Module,
    adam: torch.optim.Optimizer,
    *,
    groups: Groups,
    partition: PartitionGroups,
    stage: int,
    offload: bool,
    precision: Literal["fp32", "bf16"],
    micro_batch_size: int,
    gradient_accumulation_steps: int,
) -> DeepSpeedEngine:
    """A ZeRO engine around ``module`` and ``adam``, whose groups of experts carry ``moe`` and ``name``.

    Both are changed in place: parameters become views of flat buffers, the optimizer holds this rank's fp32 partitions. Stage
    0 is stage 1 over the groups of one rank each that :class:`PartitionGroups` has for it.
    """
    elements = sum(param.numel() for group in adam.param_groups for param in group["params"])
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": max(stage, 1),
            "offload_optimizer": {"device": "cpu" if offload else "none", "pin_memory": groups.device.type == "cuda"},
            "overlap_comm": False,
            # Only with both does DeepSpeed sum experts over their own group and divide by the data-parallel size.
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # A buffer of this many elements is allocated in every step; DeepSpeed's default is 2 GB.
            "reduce_bucket_size": max(1, min(gradients.BUCKET_ELEMENTS, elements)),
            # Its norm counts tied embeddings and tensor-parallel replicas more than once; ZeroEngine has its own.
            # Offload insists on it and then needs it for nothing but its own clipping.
            "compute_grad_norm": offload,
        },
    }
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; absent where a single process runs alone
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(verbose=False)
    mpu = _ModelParallelUnit(groups, partition)
    engine = _Engine(
        args=None,
        model=module,
        optimizer=adam,
        mpu=mpu,
        config=settings,
        config_class=DeepSpeedConfig(settings, mpu),
        dont_change_device=True,
    )
    engine.set_gradient_accumulation_boundary(True)
    engine.optimizer.compute_grad_norm = False
    # They only time forward passes that are run through the engine.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    return engine


def register_experts(params: list[nn.Parameter], groups: Groups, partition: PartitionGroups) -> str:
    """Tell DeepSpeed megatron's expert groups and mark the expert parameters with them; the name of the groups."""
    name = f"ep_size_{groups.layout.ep}"
    for group_of, ranks_of, group in (
        (deepspeed_groups._EXPERT_PARALLEL_GROUP, deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS, groups.ep),
        (
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
            partition.expert,
        ),
    ):
        group_of.clear()
        ranks_of.clear()
        group_of[name] = group
        ranks_of[name] = dist.get_process_group_ranks(group)
    for param in filter(gradients.is_expert, params):
        param.group_name = name  # type: ignore[attr-defined]
    return name


class _Engine(DeepSpeedEngine):
    """DeepSpeed's engine for megatron models: it knows their experts, and accumulates bf16 gradients in fp32."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        # DeepSpeed itself recognises only experts of its own MoE layer.
        self.has_moe_layers = any(gradients.is_expert(param) for param in model.parameters())

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        # For bf16 with fp32 accumulation DeepSpeed would choose BF16_Optimizer, another design with its own gradient
        # buffers. Its ZeRO optimizer accumulates in fp32 too, as it does for fp16 models: one path for both precisions.
        return ZERO_OPTIMIZATION


class _ModelParallelUnit:
    """megatron's groups as DeepSpeed asks for them: ``model parallel`` is tensor parallel."""

    def __init__(self, groups: Groups, partition: PartitionGroups) -> None:
        self._groups = groups
        self._partition = partition

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp

    def get_model_parallel_world_size(self) -> int:
        return self._groups.layout.tp

    def get_model_parallel_rank(self) -> int:
        return self._groups.coordinates.tp

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._partition.dense

    def get_data_parallel_world_size(self) -> int:
        return self._partition.dense.size()

    def get_data_parallel_rank(self) -> int:
        return self._partition.dense.rank()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.pp

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.layout.pp
