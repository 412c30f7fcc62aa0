"""Norm, dilated causal depth-wise convolution, SiLU and residual of an Engram layer (arXiv 2601.07372, equation 6)."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def engram_conv(
    gated: Tensor, documents: Tensor, norm: Tensor, weight: Tensor, *, context: int, dilation: int, epsilon: float
) -> Tensor:
    """``silu(conv(rms_norm(gated) * (1 + norm))) + gated`` at the last ``s`` of ``context + s`` positions::

        conv(x)[t] = sum_j weight[:, j] * x[t - dilation * (taps - 1 - j)]

    A tap that reaches before the first position or into another document reads zero. All arithmetic is fp32. A position's
    results depend on nothing but what its taps see; weight gradients are summed in an order that depends on the number of
    positions alone. The backward pass keeps the inputs and one number per position.

    Args:
        gated: ``[context + s, b, h]``, fp32 or bf16. A CPU tensor goes to numba, a CUDA tensor to Triton.
        documents: ``[b, context + s]``, document ids, any integer dtype.
        norm: ``[h]``, zero-centred scale of the norm; any floating dtype.
        weight: ``[h, taps]``; any floating dtype.
        context: Leading positions that are only read.
        dilation: Positions between taps.
        epsilon: Added to mean squares.

    Returns:
        ``[s, b, h]`` in the dtype of ``gated``.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together.
    """
    length, batch, width = gated.shape
    if gated.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"gated is {gated.dtype}, neither fp32 nor bf16")
    if not 0 <= context <= length:
        raise ValueError(f"{context} positions of context among {length}")
    if dilation < 1 or weight.shape[1] < 1:
        raise ValueError(f"{weight.shape[1]} taps {dilation} positions apart")
    for name, tensor, shape in (
        ("documents", documents, (batch, length)),
        ("norm", norm, (width,)),
        ("weight", weight, (width, weight.shape[1])),
    ):
        if tuple(tensor.shape) != shape or tensor.device != gated.device:
            raise ValueError(
                f"{name} is {list(tensor.shape)} on {tensor.device}, gated {list(gated.shape)} on {gated.device}"
            )
    return _EngramConv.apply(gated, documents, norm, weight, context, dilation, epsilon)


def _backend(tensor: Tensor) -> ModuleType:
    # By name: Triton is imported where a CUDA tensor arrives, and need not be there otherwise.
    return import_module(f"megamem_kernels.engram_conv.{'triton' if tensor.is_cuda else 'cpu'}")


class _EngramConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gated: Tensor,
        documents: Tensor,
        norm: Tensor,
        weight: Tensor,
        context: int,
        dilation: int,
        epsilon: float,
    ) -> Tensor:
        _, batch, width = gated.shape
        # Positions and sequences become rows: a tap's source is a fixed number of rows back.
        rows = gated.reshape(-1, width).contiguous()
        ids = documents.t().reshape(-1).contiguous()
        output, inverse = _backend(gated).forward(
            rows, ids, _taps(norm, weight), first=context * batch, stride=dilation * batch, epsilon=epsilon
        )
        ctx.save_for_backward(gated, ids, norm, weight, inverse)
        ctx.settings = {"first": context * batch, "stride": dilation * batch}
        return output.view(-1, batch, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gated, ids, norm, weight, inverse = ctx.saved_tensors
        width = gated.shape[-1]
        d_gated, d_taps = _backend(gated).backward(
            upstream.reshape(-1, width).contiguous(),
            gated.reshape(-1, width).contiguous(),
            ids,
            _taps(norm, weight),
            inverse,
            **ctx.settings,
        )
        d_norm = (d_taps * weight.float().t()).sum(0).to(norm.dtype)
        d_weight = (d_taps * (1 + norm.float())).t().to(weight.dtype)
        return d_gated.view(gated.shape), None, d_norm, d_weight, None, None, None


def _taps(norm: Tensor, weight: Tensor) -> Tensor:
    """``[taps, h]`` fp32: the norm's scale is part of every tap's factor."""
    return (weight.float().t() * (1 + norm.float())).contiguous()
