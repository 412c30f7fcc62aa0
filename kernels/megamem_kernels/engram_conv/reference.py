"""The Engram convolution, composed from torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def engram_conv_reference(
    gated: Tensor, documents: Tensor, norm: Tensor, weight: Tensor, *, context: int, dilation: int, epsilon: float
) -> Tensor:
    """What :func:`megamem_kernels.engram_conv.op.engram_conv` computes; float64 stays float64."""
    compute = torch.promote_types(gated.dtype, torch.float32)
    reach = (weight.shape[1] - 1) * dilation
    length = gated.shape[0] - context
    normed = F.rms_norm(gated.to(compute), norm.shape, 1 + norm.to(compute), epsilon)
    # Outputs begin at position `reach` of the padded tensor, whatever the context.
    padding = max(0, reach - context)
    normed = F.pad(normed, (0, 0, 0, 0, padding, 0))[max(0, context - reach) :]
    ids = F.pad(documents, (padding, 0), value=-1)[:, max(0, context - reach) :].t()
    *earlier, last = weight.to(compute).unbind(1)
    total = normed[reach:] * last
    for tap, factor in enumerate(earlier):
        window = slice(tap * dilation, tap * dilation + length)
        same = (ids[window] == ids[reach:]).unsqueeze(-1)
        total = torch.addcmul(total, normed[window] * same, factor)
    return F.silu(total).to(gated.dtype) + gated[context:]
