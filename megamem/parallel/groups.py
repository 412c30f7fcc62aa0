"""Process groups of a layout: the only module of megamem that touches ``megatron.core.parallel_state``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megamem.errors import ConfigError
from megamem.observe.wire import DENSE
from megamem.parallel import cpu
from megamem.parallel.layout import Coordinates, Layout

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the other ranks before the run fails."""


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's place in the world and its process groups."""

    layout: Layout
    coordinates: Coordinates
    device: torch.device
    """Where the model of this rank lives: ``cuda:LOCAL_RANK``, or the CPU."""
    world: dist.ProcessGroup
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    """Context parallel: ranks that share every sequence."""
    dp: dist.ProcessGroup
    """Data parallel: ranks that see different sequences."""
    dp_cp: dist.ProcessGroup
    """Data and context parallel together: replicas of a dense parameter, over which ZeRO shards its state."""
    pp: dist.ProcessGroup
    ep: dist.ProcessGroup
    """Ranks that together hold one copy of the experts."""
    etp: dist.ProcessGroup
    """Tensor parallel inside experts."""
    expert_dp: dist.ProcessGroup
    """Ranks that hold the same experts."""
    embedding: dist.ProcessGroup | None
    """First and last pipeline stage, which share a tied embedding; None on the stages between them."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank's pipeline stage holds the embedding."""
        return self.coordinates.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's pipeline stage computes the loss."""
        return self.coordinates.pp == self.layout.pp - 1


def init_distributed(timeout: timedelta = TIMEOUT) -> None:
    """Initialise torch.distributed from the environment that torchrun sets; a world of one where there is none.

    NCCL carries CUDA tensors and gloo host tensors; without a CUDA device gloo carries all. Does nothing when the
    default process group exists. Without an environment neither a port nor a file is used.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_device())
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"the environment sets RANK and WORLD_SIZE but not {' and '.join(missing)}; start the ranks with "
                "torchrun, or unset RANK and WORLD_SIZE to run on one"
            )
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def initialize(layout: Layout, *, seed: int) -> Groups:
    """Create the groups of ``layout`` on an initialised torch.distributed and seed megatron's random states.

    Collective over the world. ConfigError if the world has another size than the layout; RuntimeError if megatron-core
    places this rank elsewhere than :class:`~megamem.parallel.layout.Layout` does.
    """
    if dist.get_world_size() != layout.world_size:
        raise ConfigError(
            f"the layout is for {layout.world_size} ranks but {dist.get_world_size()} are running; start as many ranks "
            "as parallel.nproc says"
        )
    cpu.enable()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )
    coordinates = layout.coordinates(dist.get_rank())
    _check_coordinates(layout, coordinates)
    model_parallel_cuda_manual_seed(seed)

    return Groups(
        layout=layout,
        coordinates=coordinates,
        device=_local_device(),
        world=dist.distributed_c10d._get_default_group(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        embedding=parallel_state.get_embedding_group(check_initialized=False),
    )


def wires(groups: Groups, memory: Iterable[dist.ProcessGroup] = ()) -> dict[str, str]:
    """What the bytes of every process group are for, by the name of the group: see :mod:`megamem.observe.wire`.

    ``memory``: groups that carry rows. Groups for numbers that all ranks agree on are left out.
    """
    sequence = parallel_state.get_tensor_and_context_parallel_group()
    members: dict[str, Iterable[dist.ProcessGroup | None]] = {
        DENSE: (groups.dp, groups.dp_cp, groups.expert_dp, groups.embedding),
        "pp": (groups.pp,),
        "ep": (groups.ep, groups.etp, parallel_state.get_expert_tensor_and_model_parallel_group()),
        "cp": (groups.cp, sequence),
        "tp": (groups.tp, *([sequence] if groups.layout.cp == 1 else [])),
        "row_exchange": memory,
    }
    return {group.group_name: wire for wire, each in members.items() for group in each if group is not None}


def destroy() -> None:
    """Forget megatron's groups, so that another layout can be initialised; the default process group stays."""
    parallel_state.destroy_model_parallel()


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _check_coordinates(layout: Layout, ours: Coordinates) -> None:
    """Everything that is computed from the pure layout (owners, samples, stages) rests on this agreement."""
    megatron = Coordinates(
        rank=dist.get_rank(),
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        slice=parallel_state.get_tensor_and_context_parallel_rank(),
    )
    if megatron != ours or parallel_state.get_data_parallel_world_size() != layout.dp:
        raise RuntimeError(f"megatron-core places this rank at {megatron}, but the layout {layout} expects {ours}")
