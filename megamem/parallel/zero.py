"""Dense parameters under DeepSpeed ZeRO-1 (arXiv 1910.02054, stage 1). With ``zero_setup`` the only user of DeepSpeed.

megatron's schedule drives the backward passes on the plain module; DeepSpeed averages gradients over data parallelism,
keeps fp32 master weights and AdamW moments in one partition per data-parallel rank, and steps them. What DeepSpeed does
not know of megatron's groups is done here: gradients that are partial over tensor parallelism, embeddings that two
stages share, and a global norm that counts each parameter once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from megamem.parallel import gradients
from megamem.parallel.groups import Groups
from megamem.parallel.zero_setup import create_engine, register_experts
from megamem.train.config import OptimizerConfig

# After zero_setup, which prepares DeepSpeed for machines without CUDA.
from deepspeed.utils import (  # isort: skip
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """AdamW with ZeRO-1 on the dense parameters of this rank's pipeline stage.

    One optimizer step is ``zero_grad``, the schedule on ``module``, ``reduce_gradients``, ``grad_norm_sq``, and then
    ``step`` or ``skip``. Gradients accumulate over micro-batches in fp32 (for bf16 in a buffer beside each parameter),
    are reduced in fp32 and update fp32 master weights.

    ``module`` is cast to ``precision`` in place; afterwards its parameters are views of DeepSpeed's flat buffers.
    Weight decay applies to parameters of two or more dimensions that do not carry the attribute ``no_weight_decay``.
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
        expert_group = register_experts(trainable, groups)
        adam = torch.optim.AdamW(
            _parameter_groups(trainable, optimizer.weight_decay, expert_group),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.epsilon,
            fused=True,
        )
        self._engine = create_engine(
            module,
            adam,
            groups=groups,
            precision=precision,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        self._zero = self._engine.optimizer
        self._parameters: list[nn.Parameter] = [param for group in self._zero.bit16_groups for param in group]
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
        """Sum what is partial, then average over data parallelism. Collective. A missing gradient counts as zero.

        Dense gradients come out as the mean over the data-parallel ranks; those of experts as the sum over the ranks
        that hold them, divided by the data-parallel size too, since expert parallelism has brought them all tokens.
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
        """Squared norm of the averaged gradients of the whole model, each parameter counted once.

        One all-reduce over the world; the same on all ranks, and not finite on all where it is not finite on one. Call
        it between ``reduce_gradients`` and ``step``.
        """
        counted = [gradient for param, gradient in self._fragments() if self._counts(param)]
        total = gradients.sum_of_squares(counted, self._groups.device)
        dist.all_reduce(total, group=self._groups.world)
        return float(total)

    def step(self, lr: float, clip_coefficient: float = 1.0) -> None:
        """Scale the averaged gradients, step AdamW with rate ``lr``, gather the updated parameters. Collective."""
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

        Local; every data-parallel rank must bring the same tensors. The parameter becomes what training would have
        left: the master weight rounded to the parameter's dtype.
        """
        safe_set_full_fp32_param(param, state["master"])
        param.data.copy_(state["master"])
        for key in _MOMENTS:
            if key in state:
                safe_set_full_optimizer_state(param, state[key], key)

    def state_dict(self) -> dict[str, int]:
        """The rest of the optimizer's state as plain numbers: ``step``, the steps taken (skipped ones not counted)."""
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
        """A parameter without gradient on one rank alone (an expert without tokens) would misalign what is reduced."""
        zeros = torch.zeros_like(param, dtype=torch.float32)
        if self._zero.use_grad_accum_attribute:
            param.grad_accum = zeros  # type: ignore[attr-defined]
        else:
            param.grad = zeros

    def _fragments(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Parameters that overlap this rank's partition, with that part of their averaged gradient."""
        for param in self._parameters:
            mapping = param._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                yield param, mapping.get_lp_grad_fragment(param._index_in_param_group)  # type: ignore[attr-defined]

    def _counts(self, param: nn.Parameter) -> bool:
        """Whether this rank counts its part of a parameter in the norm.

        Of tensor-parallel replicas the first rank does, of a tied embedding the first stage. Replicas over data
        parallelism need no rule, since partitions do not overlap.
        """
        return (param in self._sharded or self._groups.coordinates.tp == 0) and not gradients.is_copy(param)

    def _adam_states(self) -> list[dict[str, torch.Tensor]]:
        return [self._zero.optimizer.state[partition] for partition in self._zero.single_partition_of_fp32_groups]

    def _create_moments(self) -> None:
        """AdamW creates its state in the first step; created now, it can be saved and loaded before."""
        for partition in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[partition].update(
                step=torch.zeros((), dtype=torch.float32, device=partition.device),
                **{key: torch.zeros_like(partition, requires_grad=False) for key in _MOMENTS},
            )
        self._zero._lazy_init_hp_params_optimizer_state()


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
