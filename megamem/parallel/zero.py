"""Dense parameters under DeepSpeed ZeRO-1: the only module of megamem that imports DeepSpeed.

megatron's schedule drives the backward passes on the plain module; DeepSpeed averages gradients over data parallel, keeps fp32
master weights and AdamW moments in one partition per data-parallel rank, and steps them. What DeepSpeed does not know about
megatron's groups is done here: gradients that are partial over tensor parallelism, embeddings tied across stages, and a global
norm that counts each parameter once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from megamem.parallel import cpu, gradients
from megamem.parallel.groups import Groups
from megamem.train.config import OptimizerConfig

cpu.prepare_deepspeed()

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """AdamW with ZeRO-1 on the dense parameters of this rank's pipeline stage.

    One optimizer step is ``zero_grad``, the schedule on ``module``, ``reduce_gradients``, ``grad_norm_sq`` and then ``step`` or
    ``skip``. All but ``zero_grad`` and ``skip`` are collective. Gradients accumulate over micro-batches in fp32 (bf16: in
    an fp32 buffer next to each parameter), are reduced in fp32, and update fp32 master weights.

    ``module`` is cast to ``precision`` in place; afterwards its parameters are views of DeepSpeed's flat buffers. Weight decay
    applies to parameters of two or more dimensions without the attribute ``no_weight_decay``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerConfig,
        groups: Groups,
        precision: Literal["fp32", "bf16"],
        micro_batch_size: int = 1,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        self._groups = groups
        self._sharded = gradients.tensor_parallel_parameters(module)
        trainable = [param for param in module.parameters() if param.requires_grad]
        expert_group = _register_expert_groups(groups)
        for param in filter(gradients.is_expert, trainable):
            param.group_name = expert_group  # type: ignore[attr-defined]
        adam = torch.optim.AdamW(
            _parameter_groups(trainable, optimizer.weight_decay, expert_group),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.epsilon,
            fused=True,
        )
        settings = _settings(precision, micro_batch_size, gradient_accumulation_steps, trainable)
        mpu = _ModelParallelUnit(groups)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; absent where a single process runs alone
        if not deepspeed.comm.is_initialized():
            deepspeed.comm.init_distributed(verbose=False)
        self._engine = _Engine(
            args=None,
            model=module,
            optimizer=adam,
            mpu=mpu,
            config=settings,
            config_class=DeepSpeedConfig(settings, mpu),
            dont_change_device=True,
        )
        self._zero = self._engine.optimizer
        self._engine.set_gradient_accumulation_boundary(True)
        # They only time forward passes that are run through the engine.
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        self._parameters = [param for group in self._zero.bit16_groups for param in group]
        self._create_moments()

    @property
    def module(self) -> nn.Module:
        """What the schedule runs."""
        return self._engine.module

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of this rank, in an order that is the same on all ranks of its stage."""
        return list(self._parameters)

    def zero_grad(self) -> None:
        """Forget gradients that were accumulated but not reduced."""
        self._zero.zero_grad(set_to_none=True)

    def reduce_gradients(self) -> None:
        """Sum what is partial, then average over data parallel; a parameter that got no gradient counts as zero.

        Dense gradients come out as the mean over the data-parallel ranks; gradients of experts as the sum over the ranks that
        hold the same experts, divided by the data-parallel size, because expert parallelism has already brought them the
        tokens of the others.
        """
        for param in self._parameters:
            if self._zero.get_gradient_for_reduction(param) is None:
                self._set_zero_gradient(param)
        if self._groups.layout.tp > 1:
            partial = [self._gradient(param) for param in self._parameters if gradients.is_partial_over_tp(param)]
            gradients.all_reduce_sum(partial, self._groups.tp)
        if self._groups.layout.pp > 1 and self._groups.embedding is not None:
            tied = [self._gradient(param) for param in self._parameters if gradients.is_tied_embedding(param)]
            gradients.all_reduce_sum(tied, self._groups.embedding)
        self._zero.setup_buckets()
        self._engine.allreduce_gradients()

    def grad_norm_sq(self) -> float:
        """Squared norm of the averaged gradients of the whole model, each parameter counted once; the same on all ranks."""
        counted = [grad for param, grad in self._fragments() if self._counts(param)]
        total = gradients.sum_of_squares(counted, self._groups.device)
        dist.all_reduce(total, group=self._groups.world)
        return float(total)

    def step(self, lr: float, clip_coefficient: float = 1.0) -> None:
        """Scale the averaged gradients, step AdamW with learning rate ``lr``, and gather the updated parameters."""
        if clip_coefficient != 1.0:
            for partition in self._zero.averaged_gradients.values():
                torch._foreach_mul_(list(partition), clip_coefficient)
        self._zero.set_lr(lr)
        self._engine.step()

    def skip(self) -> None:
        """Drop the gradients of this step; parameters, moments and the step count stay as they are."""
        self.zero_grad()
        for group in self._zero.averaged_gradients:
            self._zero.averaged_gradients[group] = None
            self._zero.all_grad_tensors[group] = None

    def full_state(self, param: nn.Parameter) -> dict[str, torch.Tensor]:
        """``master``, ``exp_avg`` and ``exp_avg_sq`` of a parameter: fp32, of its local shape.

        Collective over the data-parallel ranks (for an expert: those that hold it), which all get the whole tensors.
        """
        state = {"master": safe_get_full_fp32_param(param)}
        return state | {key: safe_get_full_optimizer_state(param, key) for key in _MOMENTS}

    def load_full_state(self, param: nn.Parameter, state: Mapping[str, torch.Tensor]) -> None:
        """Set a parameter and its master weight from ``state["master"]``, and those moments that ``state`` has.

        Local; every data-parallel rank must bring the same tensors. The parameter equals what training would have left:
        the master weight rounded to its dtype.
        """
        safe_set_full_fp32_param(param, state["master"])
        param.data.copy_(state["master"])
        for key in _MOMENTS:
            if key in state:
                safe_set_full_optimizer_state(param, state[key], key)

    def state_dict(self) -> dict[str, int]:
        """The rest of the optimizer state as plain numbers: steps taken."""
        return {"step": int(self._adam_states()[0]["step"])}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for adam in self._adam_states():
            adam["step"].fill_(state["step"])

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the module."""
        self._engine.destroy()

    def _gradient(self, param: nn.Parameter) -> torch.Tensor:
        gradient = self._zero.get_gradient_for_reduction(param)
        assert gradient is not None
        return gradient

    def _set_zero_gradient(self, param: nn.Parameter) -> None:
        """A parameter without gradient on one rank only (an expert without tokens) would shift the reduction buckets."""
        zeros = torch.zeros_like(param, dtype=torch.float32)
        if self._zero.use_grad_accum_attribute:
            param.grad_accum = zeros  # type: ignore[attr-defined]
        else:
            param.grad = zeros

    def _fragments(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Parameters with an overlap with this rank's partition, and that part of their averaged gradient."""
        for param in self._parameters:
            mapping = param._hp_mapping
            if mapping is not None:
                yield param, mapping.get_lp_grad_fragment(param._index_in_param_group)

    def _counts(self, param: nn.Parameter) -> bool:
        """Whether this rank counts its part of a parameter in the norm. Of replicas over tensor parallelism the first rank does,
        of a tied embedding the first stage; replicas over data parallelism need no rule, since partitions do not overlap.
        """
        first = param in self._sharded or self._groups.coordinates.tp == 0
        return first and not gradients.is_copy(param)

    def _adam_states(self) -> list[dict[str, torch.Tensor]]:
        return [self._zero.optimizer.state[partition] for partition in self._zero.single_partition_of_fp32_groups]

    def _create_moments(self) -> None:
        """AdamW creates its state at the first step; created now, it can be saved and loaded before that."""
        for partition in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[partition].update(
                step=torch.zeros((), dtype=torch.float32, device=partition.device),
                **{key: torch.zeros_like(partition, requires_grad=False) for key in _MOMENTS},
            )
        self._zero._lazy_init_hp_params_optimizer_state()


class _Engine(DeepSpeedEngine):
    """DeepSpeed's engine for megatron models: knows their experts, and accumulates gradients of bf16 parameters in fp32."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        # DeepSpeed itself recognises only experts of its own MoE layer.
        self.has_moe_layers = any(gradients.is_expert(param) for param in model.parameters())

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        # For bf16 with fp32 accumulation DeepSpeed would choose BF16_Optimizer, which knows no partitioned gradients; its ZeRO
        # optimizer does the same as for fp16 models, so that one path serves both precisions.
        return ZERO_OPTIMIZATION


class _ModelParallelUnit:
    """megatron's groups as DeepSpeed asks for them: ``model parallel`` is tensor parallel."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

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
        return self._groups.dp

    def get_data_parallel_world_size(self) -> int:
        return self._groups.layout.dp

    def get_data_parallel_rank(self) -> int:
        return self._groups.coordinates.dp

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.pp

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._groups.layout.pp


def _register_expert_groups(groups: Groups) -> str:
    """Tell DeepSpeed megatron's expert groups; the name that expert parameters refer to them by."""
    name = f"ep_size_{groups.layout.ep}"
    for registry, group in (
        (deepspeed_groups._EXPERT_PARALLEL_GROUP, groups.ep),
        (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP, groups.expert_dp),
    ):
        registry.clear()
        registry[name] = group
    for registry, group in (
        (deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS, groups.ep),
        (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, groups.expert_dp),
    ):
        registry.clear()
        registry[name] = dist.get_process_group_ranks(group)
    return name


def _parameter_groups(params: list[nn.Parameter], weight_decay: float, expert_group: str) -> list[dict[str, Any]]:
    """Dense and expert parameters, each with and without weight decay; empty groups are left out."""
    result: list[dict[str, Any]] = []
    for expert in (False, True):
        for decayed in (True, False):
            chosen = [p for p in params if gradients.is_expert(p) == expert and _is_decayed(p) == decayed]
            if chosen:
                group: dict[str, Any] = {"params": chosen, "weight_decay": weight_decay if decayed else 0.0}
                result.append(group | ({"name": expert_group, "moe": True} if expert else {}))
    return result


def _is_decayed(param: nn.Parameter) -> bool:
    return param.ndim >= 2 and not getattr(param, "no_weight_decay", False)


def _settings(
    precision: str, micro_batch_size: int, gradient_accumulation_steps: int, trainable: list[nn.Parameter]
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            # Both are what makes DeepSpeed reduce experts over their own group and divide them by the data-parallel size.
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # A buffer of this many elements is allocated in every step; DeepSpeed's default is 2 GB.
            "reduce_bucket_size": max(1, min(gradients.BUCKET_ELEMENTS, sum(param.numel() for param in trainable))),
            # Its norm counts tied embeddings and tensor-parallel replicas more than once; we have our own.
            "compute_grad_norm": False,
        },
    }
