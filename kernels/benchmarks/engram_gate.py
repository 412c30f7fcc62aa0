"""Gate and convolution of an Engram layer, forward and backward, beside the same composed from torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Case, Contender, Options
from torch import Tensor

from megamem_kernels.engram_conv import engram_conv
from megamem_kernels.engram_conv.reference import engram_conv_reference
from megamem_kernels.engram_gate import engram_gate
from megamem_kernels.engram_gate.reference import engram_gate_reference

_BATCH = 4
_TORCH = "torch operations"


def cases(options: Options) -> list[Case]:
    """Micro-batches of fp32 and bf16 activations, four sequences each, with a document every 100 positions."""
    sizes = [(16, 32)] if options.quick else [(1024, 256), (2048, 1024)]
    return [
        case
        for dtype in (torch.float32, torch.bfloat16)
        for length, width in sizes
        for case in (_gate(length, width, dtype, options.seed), _conv(length, width, dtype, options.seed))
    ]


def _gate(length: int, width: int, dtype: torch.dtype, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    shape = (length, _BATCH, width)
    activations = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    norms = [(torch.randn(width, generator=generator) * 0.1).requires_grad_() for _ in range(2)]
    upstream = torch.randn(shape, generator=generator).to(dtype)
    settings = {"epsilon": 1e-6, "sqrt_gate": True, "scale": width**-0.5}
    return _case(
        f"Engram gate, {length * _BATCH} tokens x {width}, {_name(dtype)}",
        lambda: engram_gate(*activations, *norms, **settings)[0],
        lambda: engram_gate_reference(*activations, *norms, **settings)[0],
        [*activations, *norms],
        upstream,
        passes=11,  # forward reads 3 and writes 1; backward reads 4 and writes 3
    )


def _conv(length: int, width: int, dtype: torch.dtype, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    gated = torch.randn(length, _BATCH, width, generator=generator).to(dtype).requires_grad_()
    norm = (torch.randn(width, generator=generator) * 0.1).requires_grad_()
    weight = (torch.randn(width, 4, generator=generator) * 0.3).requires_grad_()
    documents = (torch.rand(_BATCH, length, generator=generator) < 0.01).cumsum(1)
    upstream = torch.randn(gated.shape, generator=generator).to(dtype)
    settings = {"context": 0, "dilation": 3, "epsilon": 1e-6}
    return _case(
        f"Engram convolution, {length * _BATCH} tokens x {width}, {_name(dtype)}",
        lambda: engram_conv(gated, documents, norm, weight, **settings),
        lambda: engram_conv_reference(gated, documents, norm, weight, **settings),
        [gated, norm, weight],
        upstream,
        passes=5,  # forward reads 1 and writes 1; backward reads 2 and writes 1
    )


def _case(
    name: str,
    ours: Callable[[], Tensor],
    peer: Callable[[], Tensor],
    inputs: list[Tensor],
    upstream: Tensor,
    *,
    passes: int,
) -> Case:
    torch.testing.assert_close(ours(), peer(), atol=0.05, rtol=0.02)
    return Case(
        name,
        [
            Contender("megamem", lambda: torch.autograd.grad(ours(), inputs, upstream)),
            Contender(_TORCH, lambda: torch.autograd.grad(peer(), inputs, upstream)),
        ],
        unit_bytes=passes * upstream.nbytes,
    )


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
