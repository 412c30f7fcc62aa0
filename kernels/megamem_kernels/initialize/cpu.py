"""Initial rows on the CPU, in arithmetic that every IEEE 754 machine rounds the same way."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types, uint64
from numba.extending import intrinsic

from megamem_kernels.jit import njit
from megamem_kernels.random import row_key, word

_ONE, _32 = np.uint64(1), np.uint64(32)
_HALF_WORD = np.uint64(0xFFFFFFFF)
_SQRT_HALF_BITS = 0x3FE6A09E00000000
_MANTISSA = (1 << 52) - 1
_LN2 = 0.6931471805599453


@intrinsic
def _bits_of(typing_context: Any, value: Any) -> tuple[Any, Any]:
    """The bits of a float64 as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int64))

    return types.int64(types.float64), generate


@intrinsic
def _float_of(typing_context: Any, bits: Any) -> tuple[Any, Any]:
    """The float64 with these int64 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate


@njit(inline="always")
def _log(x: float) -> float:
    """Natural logarithm of a positive normal number, to 1e-9: libraries differ between machines and stop vectorisation."""
    shifted = _bits_of(x) - _SQRT_HALF_BITS
    exponent = shifted >> 52
    mantissa = _float_of((shifted & _MANTISSA) + _SQRT_HALF_BITS)  # in [sqrt(1/2), sqrt(2))
    s = (mantissa - 1.0) / (mantissa + 1.0)
    t = s * s
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9))))
    return exponent * _LN2 + 2.0 * s * series


@njit(inline="always")
def _quantile(p: float) -> float:
    """The normal quantile of ``p`` in ``[2**-33, 1 - 2**-33]``, to 2e-7 of its value.

    Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37 (1988), routine
    PPND7, without its branch for the tails below ``exp(-25)``; both branches are computed, so that loops vectorise.
    """
    q = p - 0.5
    central = abs(q) <= 0.425
    r = 0.180625 - q * q
    numerator = q * (3.3871327179 + r * (50.434271938 + r * (159.29113202 + r * 59.109374720)))
    denominator = 1.0 + r * (17.895169469 + r * (78.757757664 + r * 67.187563600))
    tail = min(p, 1.0 - p)
    t = np.sqrt(-_log(tail)) - 1.6
    tail_numerator = 1.4234372777 + t * (2.7568153900 + t * (1.3067284816 + t * 0.17023821103))
    tail_denominator = 1.0 + t * (0.73700164250 + t * 0.12021132975)
    numerator = numerator if central else (tail_numerator if q > 0 else -tail_numerator)
    return numerator / (denominator if central else tail_denominator)


@njit(nogil=True, cache=True, error_model="numpy")
def fill_normal(
    out: np.ndarray,
    stride: int,
    width: int,
    rows: np.ndarray,
    key: int,
    first_element: int,
    least: float,
    span: float,
    std: float,
    low: int,
    high: int,
) -> None:
    """Fill records ``[low, high)`` of ``out``, flat fp32 where record ``i`` starts at ``i * stride``.

    Args:
        out: fp32, written.
        stride: Values from one record to the next.
        width: Values of one record.
        rows: ``[n]`` int64 logical rows.
        key: uint64.
        first_element: Element of the row that is the first of the record.
        least: Probability below which nothing is drawn.
        span: Probability that is drawn from, above ``least``.
        std: Standard deviation of the untruncated normal.
        low: First record.
        high: Record after the last.
    """
    for i in range(low, high):
        keyed = row_key(key, 0, rows[i])
        values = out[i * stride : i * stride + width]
        for j in range(width):
            element = uint64(first_element) + uint64(j)
            bits = (word(keyed, element >> _ONE) >> ((element & _ONE) * _32)) & _HALF_WORD
            p = least + span * ((np.float64(bits) + 0.5) * 2.0**-32)
            values[j] = np.float32(std * _quantile(p))
