"""Which dense gradients must be summed over which group, and which are counted in the global norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

BUCKET_ELEMENTS = 1 << 24
"""Elements of one all-reduce of many small gradients: 64 MiB of fp32."""


def is_expert(param: torch.Tensor) -> bool:
    """Whether other expert-parallel ranks hold other experts in this place (megatron sets ``allreduce = False``)."""
    return not getattr(param, "allreduce", True)


def is_partial_over_tp(param: torch.Tensor) -> bool:
    """Whether each tensor-parallel rank holds a part of a replicated parameter's gradient.

    megatron marks with ``sequence_parallel`` what works on a slice of the sequence. ``grad_partial_over_tp`` is ours:
    memory modules, and norms of queries and keys, which see the heads of one rank only.
    """
    return getattr(param, "sequence_parallel", False) or getattr(param, "grad_partial_over_tp", False)


def is_tied_embedding(param: torch.Tensor) -> bool:
    """Whether the parameter is the embedding that the first and the last pipeline stage share."""
    return getattr(param, "shared_embedding", False)


def tensor_parallel_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Parameters of which each tensor-parallel rank holds another part, experts included; all others are replicas.

    Told from the layers: megatron sets ``tensor_model_parallel`` only on weights that it initialises itself.
    """
    sharded: set[Any] = set()
    for layer in module.modules():
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            sharded.add(layer.weight)
        if isinstance(layer, ColumnParallelLinear):
            sharded.add(layer.bias)
    sharded.discard(None)  # no bias, or a weight that is tied to another layer
    return sharded


def is_copy(param: torch.Tensor) -> bool:
    """Whether the parameter is the last pipeline stage's copy of an embedding that the first stage holds."""
    return getattr(param, "shared", False)


def all_reduce_sum(
    tensors: Iterable[torch.Tensor],
    group: dist.ProcessGroup,
    device: torch.device,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> None:
    """Sum tensors of one dtype over ``group`` in place, many per all-reduce. All ranks bring the same shapes.

    The sum is taken on ``device``, wherever the tensors are: offloaded gradients too go by the accelerator's network.
    """
    bucket: list[torch.Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and elements + tensor.numel() > bucket_elements:
            _reduce_bucket(bucket, group, device)
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        _reduce_bucket(bucket, group, device)


def _reduce_bucket(bucket: Sequence[torch.Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    flat = _flatten_dense_tensors(bucket).to(device)
    dist.all_reduce(flat, group=group)
    torch._foreach_copy_(list(bucket), list(_unflatten_dense_tensors(flat, bucket)))


def sum_of_squares(fragments: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squares of all elements as an fp64 scalar on ``device``, without waiting for it."""
    if not fragments:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm([fragment.reshape(-1) for fragment in fragments], dtype=torch.float32)
    return torch.stack(list(norms)).to(device).double().square().sum()
