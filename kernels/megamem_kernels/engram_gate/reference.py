"""The Engram gate, composed from torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SCORE = 1e-6
"""The square root's slope is infinite at zero; below this magnitude of the score it is taken as flat."""


def engram_gate_reference(
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
    """What :func:`megamem_kernels.engram_gate.op.engram_gate` computes; float64 stays float64."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    width = norm_query.shape
    query = F.rms_norm(hidden.to(compute), width, 1 + norm_query.to(compute), epsilon)
    keyed = F.rms_norm(key.to(compute), width, 1 + norm_key.to(compute), epsilon)
    score = (query * keyed).sum(-1, keepdim=True) * scale
    if sqrt_gate:
        score = score.sign() * score.abs().clamp_min(MIN_SCORE).sqrt()
    gate = score.sigmoid()
    return (gate * value).to(hidden.dtype), gate.detach()
