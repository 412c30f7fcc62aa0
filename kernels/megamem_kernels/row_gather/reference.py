"""Decoding of rows by index: the definition, in plain torch. The raw forms are ``out[:] = source[index]`` and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megamem_kernels.formats import FP8_BLOCK, ROWS, SCALES


def gather_rows(fields: Mapping[str, Tensor], index: Tensor, out: Tensor) -> Tensor:
    """See the op."""
    values = fields[ROWS].view(torch.uint8)[index].view(fields[ROWS].dtype).float()
    if SCALES in fields:
        powers = fields[SCALES][index].view(torch.float8_e8m0fnu).float()
        values *= powers.repeat_interleave(FP8_BLOCK, dim=1)[:, : values.shape[1]]
    if out.dtype == torch.bfloat16:
        largest = torch.finfo(torch.bfloat16).max
        values = torch.where(values.isfinite(), values.clamp(-largest, largest), values)
    return out.copy_(values)
