"""The Engram gate, forward and backward in one pass each (arXiv 2601.07372, equations 3-5, with the released code's square
root)."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def engram_gate(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    norm_query: Tensor,
    norm_key: Tensor,
    *,
    epsilon: float,
    sqrt_gate: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Values, gated by how well their keys fit the hidden states::

        score = scale * <rms_norm(hidden) * (1 + norm_query), rms_norm(key) * (1 + norm_key)>
        score = sign(score) * sqrt(max(|score|, 1e-6))                  with sqrt_gate; its gradient is 0 below 1e-6
        gated = sigmoid(score) * value

    All arithmetic is fp32. A row's results depend on nothing but the row; weight gradients are summed in an order that
    depends on the number of rows alone. The backward pass keeps the inputs and four numbers per row.

    Args:
        hidden: ``[..., h]``, fp32 or bf16. A CPU tensor goes to numba, a CUDA tensor to Triton.
        key: As ``hidden`` in shape, dtype and device.
        value: Likewise.
        norm_query: ``[h]``, zero-centred scale of the hidden state's norm; any floating dtype.
        norm_key: ``[h]``, that of the key's norm.
        epsilon: Added to mean squares.
        sqrt_gate: Whether the score is replaced by its signed square root.
        scale: Factor of the score.

    Returns:
        ``(gated, gate)``: ``[..., h]`` in the dtype of ``hidden``, and ``[..., 1]`` fp32 without gradient.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together.
    """
    for name, tensor in (("key", key), ("value", value)):
        if (tensor.shape, tensor.dtype, tensor.device) != (hidden.shape, hidden.dtype, hidden.device):
            raise ValueError(f"{name} is {_text(tensor)}, hidden {_text(hidden)}")
    if hidden.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"hidden is {_text(hidden)}, neither fp32 nor bf16")
    for name, weight in (("norm_query", norm_query), ("norm_key", norm_key)):
        if weight.shape != hidden.shape[-1:] or weight.device != hidden.device:
            raise ValueError(f"{name} is {_text(weight)}, hidden {_text(hidden)}")
    return _EngramGate.apply(hidden, key, value, norm_query, norm_key, epsilon, sqrt_gate, scale)


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _backend(tensor: Tensor) -> ModuleType:
    # By name: Triton is imported where a CUDA tensor arrives, and need not be there otherwise.
    return import_module(f"megamem_kernels.engram_gate.{'triton' if tensor.is_cuda else 'cpu'}")


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


class _EngramGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        key: Tensor,
        value: Tensor,
        norm_query: Tensor,
        norm_key: Tensor,
        epsilon: float,
        sqrt_gate: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        gated, gate, rows = _backend(hidden).forward(
            *(_rows(tensor) for tensor in (hidden, key, value)),
            (1 + norm_query.float()) * (1 + norm_key.float()),
            epsilon=epsilon,
            sqrt_gate=sqrt_gate,
            scale=scale,
        )
        ctx.save_for_backward(hidden, key, value, norm_query, norm_key, gate, rows)
        ctx.settings = {"sqrt_gate": sqrt_gate, "scale": scale}
        output = gate.view(*hidden.shape[:-1], 1)
        ctx.mark_non_differentiable(output)
        return gated.view(hidden.shape), output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, key, value, norm_query, norm_key, gate, rows = ctx.saved_tensors
        scale_query, scale_key = 1 + norm_query.float(), 1 + norm_key.float()
        *inputs, weight = _backend(hidden).backward(
            *(_rows(tensor) for tensor in (upstream, hidden, key, value)),
            scale_query * scale_key,
            gate,
            rows,
            **ctx.settings,
        )
        return (
            *(gradient.view(hidden.shape) for gradient in inputs),
            (weight * scale_key).to(norm_query.dtype),
            (weight * scale_query).to(norm_key.dtype),
            None,
            None,
            None,
        )
