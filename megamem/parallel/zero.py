"""Dense parameters under DeepSpeed ZeRO, stages 0 to 2 (arXiv 1910.02054). With ``zero_setup``, ``zero_stage2`` and
``host_adam`` the only user of DeepSpeed.

megatron's schedule drives the backward passes on the plain module; DeepSpeed averages gradients over data parallelism,
keeps fp32 master weights and AdamW moments in one partition per data-parallel rank, and steps them. What DeepSpeed does
not know of megatron's groups is done here: gradients that are partial over tensor parallelism, embeddings that two
stages share, and a global norm that counts each parameter once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from megamem.parallel import gradients
from megamem.parallel.groups import Groups
from megamem.parallel.host_adam import HostAdam, create_host_adam
from megamem.parallel.zero_memory import zero_memory
from megamem.parallel.zero_setup import PartitionGroups, create_engine, register_experts
from megamem.parallel.zero_stage2 import GradientStream
from megamem.train.config import OptimizerConfig

# After zero_setup, which prepares DeepSpeed for machines without CUDA.
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID  # isort: skip
from deepspeed.utils import (  # isort: skip
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """AdamW with ZeRO on the dense parameters of this rank's pipeline stage.

    One optimizer step is ``zero_grad``, the schedule on ``module``, ``reduce_gradients``, ``grad_norm_sq``, and then
    ``step`` or ``skip``. Gradients accumulate over micro-batches in fp32 (for bf16 in a buffer beside each parameter),
    are reduced in fp32 and update fp32 master weights.

    ``optimizer.zero_stage`` says what is split over the replicas of a parameter. 0: nothing. 1: master weights and moments.
    2: gradients too, which are reduced in every backward pass, rounded to ``precision`` before they are summed in fp32.
    ``optimizer.offload="host"`` keeps master weights, moments and the averaged gradients in host memory, and steps there.

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
        self._stage = optimizer.zero_stage
        self._offload = optimizer.offload == "host"
        self._sharded = gradients.tensor_parallel_parameters(module)
        self.notice = ""
        """What the user should know about how the optimizer runs; empty for nothing."""
        trainable = [param for param in module.parameters() if param.requires_grad]
        self._partition = PartitionGroups.of_stage(self._stage, groups)
        expert_group = register_experts(trainable, groups, self._partition)
        adam = self._create_adam(_parameter_groups(trainable, optimizer.weight_decay, expert_group), optimizer)
        self._engine = create_engine(
            module,
            adam,
            groups=groups,
            partition=self._partition,
            stage=self._stage,
            offload=self._offload,
            precision=precision,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        self._zero = self._engine.optimizer
        self._parameters: list[nn.Parameter] = [param for group in self._zero.bit16_groups for param in group]
        self._stream = GradientStream(module, self._zero) if self._stage == 2 else None
        self._create_moments()

    def _create_adam(self, param_groups: list[dict[str, Any]], optimizer: OptimizerConfig) -> torch.optim.Optimizer:
        betas = (optimizer.betas[0], optimizer.betas[1])
        if not self._offload:
            return torch.optim.AdamW(param_groups, lr=optimizer.lr, betas=betas, eps=optimizer.epsilon, fused=True)
        adam, problem = create_host_adam(
            param_groups, lr=optimizer.lr, betas=betas, eps=optimizer.epsilon, groups=self._groups
        )
        if problem:
            self.notice = (
                "optimizer.offload=host steps with torch's fused AdamW, since DeepSpeed's CPU Adam cannot be built here "
                f"({problem})"
            )
            if self._groups.coordinates.rank == 0:
                logger.warning("%s", self.notice)
        return adam

    @property
    def module(self) -> nn.Module:
        """What the schedule runs."""
        return self._engine.module

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of this rank, in an order that is the same on all ranks of its stage."""
        return list(self._parameters)

    def zero_grad(self) -> None:
        """Forget the gradients of an unfinished step."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        for group in range(len(zero.bit16_groups)):
            zero.averaged_gradients[group] = None
            zero.all_grad_tensors[group] = None
        # From the second one on, offloaded gradients are added to what was there.
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        if self._offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids.clear()
        if self._stream is not None:
            self._stream.reset()

    def reduce_gradients(self) -> None:
        """Average over data parallelism, then sum what is partial. Collective. A missing gradient counts as zero.

        Dense gradients come out as the mean over the data-parallel ranks; those of experts as the sum over the ranks
        that hold them, divided by the data-parallel size too, since expert parallelism has brought them all tokens. With
        context parallelism, "data-parallel" includes it: every rank of both holds a part of the batch.
        """
        if self._stream is not None:
            self._stream.finish()
            layout = self._groups.layout
            if layout.tp * layout.cp * layout.ep * layout.etp > 1:
                self._stream.check_alike(self._groups)
            self._zero.finalize_gradient_accumulation_boundary()
        else:
            self._reduce_accumulated()
        if self._offload:
            self._zero._wait_for_offload_copies()
        if self._stage == 0:
            self._average_over_replicas()
        if self._groups.layout.tp > 1:
            # In the partitions, which are cut alike on all ranks of a tensor-parallel group.
            partial = [gradient for param, gradient in self._fragments() if gradients.is_partial_over_tp(param)]
            gradients.all_reduce_sum(partial, self._groups.tp, self._groups.device)

    def _reduce_accumulated(self) -> None:
        for param in self._parameters:
            if self._zero.get_gradient_for_reduction(param) is None:
                self._set_zero_gradient(param)
        if self._groups.layout.pp > 1 and self._groups.embedding is not None:
            # Whole, before they are cut: the two stages hold different parameters and cut them elsewhere.
            tied = [self._gradient(param) for param in self._parameters if gradients.is_tied_embedding(param)]
            gradients.all_reduce_sum(tied, self._groups.embedding, self._groups.device)
        self._zero.setup_buckets()
        self._engine.allreduce_gradients()

    def _average_over_replicas(self) -> None:
        dense = [gradient for param, gradient in self._fragments() if not gradients.is_expert(param)]
        experts = [gradient for param, gradient in self._fragments() if gradients.is_expert(param)]
        gradients.all_reduce_sum(dense, self._groups.dp_cp, self._groups.device)
        gradients.all_reduce_sum(experts, self._groups.expert_dp, self._groups.device)
        torch._foreach_div_([*dense, *experts], self._groups.dp_cp.size())

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
            torch._foreach_mul_([gradient for _, gradient in self._fragments()], clip_coefficient)
        self._zero.set_lr(lr)
        self._engine.step()

    def skip(self) -> None:
        """Drop the gradients of this step; parameters, moments and the step count stay as they are."""
        self.zero_grad()

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
            adam["step"] = self._adam_step(state["step"])

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds by part and place, as in :mod:`megamem.observe.accounting`."""
        return zero_memory(self.module, self._zero, stage=self._stage, device=self._groups.device)

    def close(self) -> None:
        """Remove the hooks from the module, and the groups that only this engine uses."""
        if self._stream is not None:
            self._stream.close()
        self._engine.destroy()
        self._partition.close()

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
        """Whether this rank counts its part of a parameter in the norm: of replicas the first rank does, of a tied embedding
        the first stage. Replicas over data parallelism need no rule where partitions split them, since those do not overlap.
        """
        expert = gradients.is_expert(param)
        replicas = []
        if param not in self._sharded:
            replicas.append(self._groups.etp if expert else self._groups.tp)
        if self._stage == 0:
            replicas.append(self._groups.expert_dp if expert else self._groups.dp_cp)
        return not gradients.is_copy(param) and all(group.rank() == 0 for group in replicas)

    def _adam_states(self) -> list[dict[str, torch.Tensor]]:
        return [self._zero.optimizer.state[partition] for partition in self._zero.single_partition_of_fp32_groups]

    def _create_moments(self) -> None:
        """AdamW creates its state in the first step; created now, it can be saved and loaded before."""
        for partition in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[partition].update(
                step=self._adam_step(0),
                **{key: torch.zeros_like(partition, requires_grad=False) for key in _MOMENTS},
            )
        self._zero._lazy_init_hp_params_optimizer_state()

    def _adam_step(self, step: int) -> Any:
        """A step count as the optimizer in use keeps it."""
        if isinstance(self._zero.optimizer, HostAdam):
            return step
        return torch.tensor(float(step), device=self._zero.single_partition_of_fp32_groups[0].device)


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
