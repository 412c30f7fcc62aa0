"""Initial rows: the definition, with the quantile function of Python's standard library."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from megamem_kernels.random import row_key, word

TRUNCATION = 2.0
_NORMAL = NormalDist()


def normal_row_reference(
    row: int, width: int, *, key: int, first_element: int, std: float, truncated: bool
) -> np.ndarray:
    """``[width]`` float64: what :func:`megamem_kernels.initialize.op.normal_rows` rounds to fp32 in one row."""
    keyed = np.uint64(row_key(np.uint64(key), np.uint64(0), np.uint64(row)))
    low = _NORMAL.cdf(-TRUNCATION) if truncated else 0.0
    values = []
    for element in range(first_element, first_element + width):
        bits = int(word(keyed, np.uint64(element // 2))) >> 32 * (element % 2) & 0xFFFFFFFF
        values.append(std * _NORMAL.inv_cdf(low + (1 - 2 * low) * (bits + 0.5) / 2**32))
    return np.array(values)
