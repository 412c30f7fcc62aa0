"""The n-gram hash on a GPU: one program per block of positions."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


@triton.jit
def _hash_kernel(
    tokens,
    documents,
    multipliers,
    primes,
    offsets,
    rows,
    positions,
    length,
    context,
    pad_id,
    ORDERS: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = item < positions
    hashed = length - context
    position = item % hashed + context
    at = item // hashed * length + position
    document = tl.load(documents + at, mask=live, other=0)
    mix = tl.load(tokens + at, mask=live, other=0) * tl.load(multipliers)
    lane = tl.arange(0, LANES)
    for order in tl.static_range(ORDERS):
        back = order + 1
        inside = live & (position >= back)
        same = inside & (tl.load(documents + at - back, mask=inside, other=0) == document)
        token = tl.load(tokens + at - back, mask=same, other=pad_id)
        mix = mix ^ (token * tl.load(multipliers + back))
        column = order * HEADS + lane
        prime = tl.load(primes + column, mask=lane < HEADS, other=1)
        offset = tl.load(offsets + column, mask=lane < HEADS, other=0)
        row = mix[:, None] % prime[None, :] + offset[None, :]
        target = rows + item[:, None] * (ORDERS * HEADS) + column[None, :]
        tl.store(target, row, mask=live[:, None] & (lane < HEADS)[None, :])


def hash_positions_triton(
    tokens: Tensor,
    documents: Tensor,
    multipliers: np.ndarray,
    primes: np.ndarray,
    offsets: np.ndarray,
    pad_id: int,
    context: int,
    rows: Tensor,
) -> None:
    """Fill ``rows`` ``[b, s - context, orders * heads]`` (contiguous int64); the rest as in the op."""
    batch, length = tokens.shape
    orders, heads = primes.shape
    positions = batch * (length - context)
    if not rows.numel():
        return
    constants = (torch.from_numpy(values).to(tokens.device) for values in (multipliers, primes, offsets))
    _hash_kernel[(triton.cdiv(positions, _BLOCK),)](
        tokens.long().contiguous(),
        documents.contiguous(),
        *constants,
        rows,
        positions,
        length,
        context,
        pad_id,
        ORDERS=orders,
        HEADS=heads,
        LANES=triton.next_power_of_2(heads),
        BLOCK=_BLOCK,
    )
