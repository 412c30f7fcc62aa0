"""megatron-core and DeepSpeed without CUDA: the only module of megamem that replaces names in other libraries, but for
:mod:`megamem.observe.wire` while it counts.

megatron-core 0.16.1 names CUDA devices, streams and random states in code that otherwise runs anywhere torch runs. On a
machine with a CUDA device :func:`enable` does nothing. On one without, each replaced name would raise when called (or,
for ``torch.cuda.manual_seed``, queue a call for ever), so nothing that works today changes its meaning.

``device="cuda"`` literals are handled where they stand, by giving the few modules that contain them a ``torch`` whose
tensor factories know only the CPU. A process-wide ``TorchFunctionMode`` would do the same and cost every operator a
Python call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_CPU = torch.device("cpu")
_FACTORIES = frozenset({"empty", "full", "ones", "tensor", "zeros"})
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.pipeline_parallel.schedules",  # the token counter of every schedule
    "megatron.core.transformer.moe.moe_utils",  # values of the auxiliary-loss tracker
    "megatron.core.transformer.utils",  # default attention masks
    "megatron.core.tensor_parallel.data",  # sizes in broadcast_data
)
_enabled = False


def enable() -> bool:
    """Make megatron-core run on the CPU; whether it does (False, with nothing touched, when there is a CUDA device).

    Call it before a megatron model is built or its random states are seeded; calling it again changes nothing.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if not _enabled:
        _replace_devices()
        _replace_streams()
        _replace_random_states()
        _replace_in_moe()
        _replace_uneven_collectives()
        # megatron decorates small functions with torch.compile; on the CPU compiling them takes a C++ compiler and
        # seconds per process, and gains nothing.
        torch.compiler.set_stance("force_eager")
        _enabled = True
    return True


def prepare_deepspeed() -> None:
    """Make DeepSpeed run on the CPU without compiling anything. Call it before DeepSpeed is imported anywhere else."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # The operations that it may compile. With its communication it would build a shared-memory all-reduce for
    # inference; from an empty dictionary it builds nothing and does not run compilers to find out whether it could.
    _replace(deepspeed.ops, __compatible_ops__={})


def _replace(owner: Any, **names: Any) -> None:
    for name, value in names.items():
        setattr(owner, name, value)


def _replace_devices() -> None:
    _replace(torch.cuda, current_device=lambda: _CPU)  # where megatron allocates weights and communication buffers
    _replace(torch.Tensor, cuda=lambda self, *args, **kwargs: self)  # copies of tied embeddings
    for name in _MODULES_WITH_CUDA_LITERALS:
        _replace(importlib.import_module(name), torch=_CpuTorch("torch"))


class _CpuTorch(types.ModuleType):
    """``torch`` for one module: tensor factories that are asked for a CUDA device allocate on the CPU."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in _FACTORIES:
            value = _on_cpu(value)
        setattr(self, name, value)
        return value


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def allocate(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device=_CPU if device == "cuda" else device, **kwargs)

    return allocate


class _Stream:
    """Work on the CPU is done when the call returns, so streams and events have nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def _replace_streams() -> None:
    stream = _Stream()
    _replace(
        torch.cuda,
        Stream=_Stream,
        Event=_Event,
        current_stream=lambda device=None: stream,
        stream=contextlib.nullcontext,
        synchronize=lambda device=None: None,  # point-to-point communication ends with one
    )


def _replace_random_states() -> None:
    """The tracked random states are states of the CPU generator, which is where draws on CPU tensors come from."""
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    manual_seed = torch.default_generator.manual_seed
    _replace(torch.cuda, get_rng_state=get_state, set_rng_state=set_state, manual_seed=manual_seed)
    _replace(random, _get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)
    # The tracker warns when the CPU state moves while its own state is active; here they are one.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _replace_in_moe() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not moe_utils.HAVE_TE:
        _replace(moe_utils, te_general_gemm=None)  # compared with None, but defined only with Transformer Engine

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    # megatron's own converts only CUDA tensors; the split sizes of an all-to-all must not stay tensors.
    _replace(token_dispatcher, maybe_move_tensor_to_cpu=move)


def _replace_uneven_collectives() -> None:
    """Token exchange of experts under tensor parallelism gathers and scatters as many rows as the router says. gloo
    wants equal counts in both collectives, but not in an all-to-all.
    """
    from megatron.core.tensor_parallel import mappings

    gather_even, scatter_even = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        tensor: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather_even(tensor, group, output_split_sizes, use_global_buffer)
        output = tensor.new_empty(sum(output_split_sizes), *tensor.shape[1:])
        copies = torch.cat([tensor] * group.size())
        dist.all_to_all_single(output, copies, output_split_sizes, [len(tensor)] * group.size(), group=group)
        return output

    def reduce_scatter(
        tensor: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter_even(tensor, group, input_split_sizes, use_global_buffer)
        rows = input_split_sizes[group.rank()]
        parts = tensor.new_empty(group.size(), rows, *tensor.shape[1:])
        dist.all_to_all_single(
            parts.flatten(0, 1), tensor.contiguous(), [rows] * group.size(), input_split_sizes, group=group
        )
        return parts.sum(0)

    _replace(mappings, _gather_along_first_dim=gather, _reduce_scatter_along_first_dim=reduce_scatter)
