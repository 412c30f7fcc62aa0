"""Sums that do not depend on order: the norm of row gradients is the same bit for bit however rows are placed or owned."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

AllReduce = Callable[[np.ndarray, str], np.ndarray]
"""``(array, "max" or "sum")`` to its element-wise maximum or sum over all ranks."""

_LIMB_BITS = 30
_LIMBS = 3


def order_free_sum(values: np.ndarray, all_reduce: AllReduce) -> float:
    """The sum over all ranks of all ``values``, a function of their multiset alone.

    Floating-point addition depends on its order, and so on which rank owns which row. Here every value is cut into three
    30-bit integers relative to the greatest one, which add exactly; what lies 90 bits below the greatest is dropped.

    Args:
        values: ``[n]`` float64, not negative, ``n`` below 2**32 over all ranks.
        all_reduce: Collective over the ranks that share the sum.

    Returns:
        The sum; infinity where any value is not finite.
    """
    greatest = float(np.max(values, initial=0.0))
    greatest = float(all_reduce(np.array([greatest if math.isfinite(greatest) else math.inf]), "max")[0])
    if greatest == 0.0 or not math.isfinite(greatest):
        return greatest
    exponent = math.frexp(greatest)[1]
    rest = np.ldexp(values, _LIMB_BITS - exponent)
    limbs = np.zeros(_LIMBS, dtype=np.int64)
    for limb in range(_LIMBS):
        whole = np.floor(rest)
        limbs[limb] = whole.astype(np.int64).sum()
        rest = np.ldexp(rest - whole, _LIMB_BITS)
    total = 0
    for limb in all_reduce(limbs, "sum").tolist():
        total = (total << _LIMB_BITS) + limb
    return math.ldexp(float(total), exponent - _LIMBS * _LIMB_BITS)
