"""Optimizer updates of touched rows in Triton: one program per row, which walks over its blocks of 32 elements.

Every loop of a program handles ``TILES`` blocks, the unit that shares a scale in fp8. ``x`` and ``kept`` stand for what the
ops call gradient or delta, and for what weight decay leaves of a weight.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamem_kernels.formats import FP8_BLOCK, ROWS, SCALES
from megamem_kernels.rounding.triton import random_lanes, round_bf16, round_fp8, scale_fp8
from megamem_kernels.row_gather.triton import decode_fp8
from megamem_kernels.row_update.touched import TouchedRows, TouchedState

_MAX_TILES = 32

_LANES = tl.constexpr(FP8_BLOCK)
_FP32, _BF16, _FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# From _ADAM on, rules have moments that catch up.
_ADD, _ADAGRAD, _ADAM, _PARTIAL_ADAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _open_row(rows, scales, slot, tile, element, live, width, FORMAT: tl.constexpr):
    bits = tl.load(rows + slot * width + element, mask=live, other=0)
    if FORMAT == _FP8:
        per_row = tl.cdiv(width, _LANES)
        scale = tl.load(scales + slot * per_row + tile, mask=tile < per_row, other=127)
        return decode_fp8(bits, scale[:, None])
    elif FORMAT == _BF16:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits


@triton.jit
def _close_row(rows, scales, slot, tile, element, live, width, values, key, step, row_id, FORMAT: tl.constexpr):
    at = rows + slot * width + element
    if FORMAT == _FP32:
        tl.store(at, values, mask=live)
    else:
        bits = tl.where(live, values, 0.0).to(tl.uint32, bitcast=True)
        r16 = random_lanes(key, step, row_id, element)
        if FORMAT == _BF16:
            tl.store(at, round_bf16(bits, r16), mask=live)
        else:
            per_row = tl.cdiv(width, _LANES)
            scale = scale_fp8(tl.max((bits & 0x7FFFFFFF).to(tl.int32), axis=1))
            tl.store(scales + slot * per_row + tile, scale.to(tl.uint8), mask=tile < per_row)
            tl.store(at, round_fp8(bits, scale[:, None], r16, False), mask=live)


@triton.jit
def _decay(beta, gap):
    """``beta ** gap`` in float64, then fp32; ``beta`` points to a float64."""
    base = tl.load(beta)
    power = base * 0 + 1
    for bit in tl.static_range(31):
        power = tl.where(((gap >> bit) & 1) == 1, power * base, power)
        base = base * base
    return power.to(tl.float32)


@triton.jit
def _mean_square(x, width, TILES: tl.constexpr):
    total = tl.zeros([TILES, _LANES], tl.float32)
    for start in range(0, tl.cdiv(width, _LANES), TILES):
        element = (start + tl.arange(0, TILES))[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
        value = tl.load(x + element, mask=element < width, other=0.0)
        total += value * value
    return tl.sum(tl.sum(total, axis=1), axis=0) / width


@triton.jit(do_not_specialize=["key", "step", "rate", "kept", "new1", "new2", "root", "epsilon"])
def _update(
    rows, scales, slots, ids, key, step, x, state_slots, first, second, last_step, betas,
    rate, kept, new1, new2, root, epsilon, width,
    RULE: tl.constexpr, FORMAT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    slot, row_id, state = tl.load(slots + i), tl.load(ids + i), tl.load(state_slots + i)
    x += i * width
    end = width
    if RULE == _ADAGRAD:
        sum_of_squares = tl.load(first + state) + _mean_square(x, width, TILES)
        tl.store(first + state, sum_of_squares)
        rate = rate / (tl.sqrt(sum_of_squares) + epsilon)
    if RULE >= _ADAM:
        gap = step - tl.load(last_step + state)
        end = tl.where(gap >= 1, width, 0)
        tl.store(last_step + state, step, mask=gap >= 1)
        old1, old2 = _decay(betas, gap), _decay(betas + 1, gap)
    if RULE == _PARTIAL_ADAM:
        v = old2 * tl.load(second + state) + new2 * _mean_square(x, width, TILES)
        tl.store(second + state, v, mask=gap >= 1)
        rate = rate / (tl.sqrt(v) * root + epsilon)
    for start in range(0, tl.cdiv(end, _LANES), TILES):
        tile = start + tl.arange(0, TILES)
        element = tile[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
        live = element < width
        value = tl.load(x + element, mask=live, other=0.0)
        w = _open_row(rows, scales, slot, tile, element, live, width, FORMAT)
        if RULE >= _ADAM:
            m_at = first + state * width + element
            m = old1 * tl.load(m_at, mask=live, other=0.0) + new1 * value
            tl.store(m_at, m, mask=live)
            move = rate * m
            if RULE == _ADAM:
                v_at = second + state * width + element
                squares = old2 * tl.load(v_at, mask=live, other=0.0) + new2 * (value * value)
                tl.store(v_at, squares, mask=live)
                move = move / (tl.sqrt(squares) * root + epsilon)
        else:
            move = rate * value
        _close_row(rows, scales, slot, tile, element, live, width, kept * w - move, key, step, row_id, FORMAT)


@triton.jit(do_not_specialize=["step", "one", "new"])
def _momentum(slots, buffer, last_step, x, out, betas, step, one, new, width, TILES: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i)
    gap = step - tl.load(last_step + slot)
    tl.store(last_step + slot, step, mask=gap >= 1)
    old = _decay(betas, gap)
    for start in range(0, tl.cdiv(tl.where(gap >= 1, width, 0), _LANES), TILES):
        element = (start + tl.arange(0, TILES))[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
        live = element < width
        value = tl.load(x + i * width + element, mask=live, other=0.0)
        at = buffer + slot * width + element
        m = old * tl.load(at, mask=live, other=0.0) + new * value
        tl.store(at, m, mask=live)
        tl.store(out + i * width + element, one * m + new * value, mask=live)


def add_scaled(rows: TouchedRows, delta: Tensor, alpha: float, kept: float, step: int) -> None:
    """See the op."""
    _launch(_ADD, rows, None, delta, {}, step, rate=-alpha, kept=kept)


def rowwise_adagrad(
    rows: TouchedRows, state: TouchedState, gradient: Tensor, lr: float, epsilon: float, kept: float, step: int
) -> None:
    """See the op."""
    arrays = {"first": state.arrays["accumulator"]}
    _launch(_ADAGRAD, rows, state, gradient, arrays, step, rate=lr, kept=kept, epsilon=epsilon)


def adam(
    rows: TouchedRows,
    state: TouchedState,
    gradient: Tensor,
    rate: float,
    beta1: float,
    beta2: float,
    root: float,
    epsilon: float,
    kept: float,
    step: int,
) -> None:
    """See the ops ``lazy_adam_`` and, for ``exp_avg_sq`` with one value per row, ``partial_rowwise_adam_``."""
    second = state.arrays["exp_avg_sq"]
    arrays = {
        "first": state.arrays["exp_avg"],
        "second": second,
        "last_step": state.arrays["last_step"],
        "betas": _betas(gradient.device, beta1, beta2),
    }
    rule = _ADAM if second.dim() == 2 else _PARTIAL_ADAM
    _launch(
        rule, rows, state, gradient, arrays, step,
        rate=rate, kept=kept, new1=1 - beta1, new2=1 - beta2, root=root, epsilon=epsilon,
    )  # fmt: skip


def momentum(state: TouchedState, gradient: Tensor, beta: float, step: int, out: Tensor) -> None:
    """See the op; ``out`` ``[u, width]`` fp32 receives the result."""
    count, width = gradient.shape
    buffer, last_step = state.arrays["momentum_buffer"], state.arrays["last_step"]
    if gradient.numel():
        betas = _betas(gradient.device, beta)
        _momentum[(count,)](
            state.slots, buffer, last_step, gradient, out, betas, step, beta, 1 - beta, width, TILES=_tiles(width)
        )


def _launch(
    rule: tl.constexpr,
    rows: TouchedRows,
    state: TouchedState | None,
    x: Tensor,
    arrays: dict[str, Tensor],
    step: int,
    *,
    rate: float,
    kept: float,
    new1: float = 0.0,
    new2: float = 0.0,
    root: float = 0.0,
    epsilon: float = 0.0,
) -> None:
    count, width = x.shape
    if not x.numel():
        return
    table = rows.fields[ROWS]
    stored, bits = {
        torch.float32: (_FP32, torch.float32),
        torch.bfloat16: (_BF16, torch.uint16),
        torch.float8_e4m3fn: (_FP8, torch.uint8),
    }[table.dtype]
    # A rule that has no use for an array never touches it; the gradient stands in.
    _update[(count,)](
        table.view(bits), rows.fields.get(SCALES, x), rows.slots, rows.ids, rows.key, step,
        x, rows.slots if state is None else state.slots,
        arrays.get("first", x), arrays.get("second", x), arrays.get("last_step", x), arrays.get("betas", x),
        rate, kept, new1, new2, root, epsilon, width,
        RULE=rule.value, FORMAT=stored.value, TILES=_tiles(width),
    )  # fmt: skip


def _tiles(width: int) -> int:
    return min(_MAX_TILES, triton.next_power_of_2(triton.cdiv(width, FP8_BLOCK)))


@lru_cache(maxsize=16)
def _betas(device: torch.device, *betas: float) -> Tensor:
    return torch.tensor(betas, dtype=torch.float64, device=device)
