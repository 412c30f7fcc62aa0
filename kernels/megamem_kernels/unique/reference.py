"""Distinct ids: the definition."""

from __future__ import annotations

import numpy as np


def unique_reference(ids: np.ndarray, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`megamem_kernels.unique.op.unique`, by a dictionary."""
    for value in ids.tolist():
        if not 0 <= value < bound:
            raise ValueError(f"id {value} is not in [0, {bound})")
    distinct = sorted(set(ids.tolist()))
    position = {value: index for index, value in enumerate(distinct)}
    inverse = [position[value] for value in ids.tolist()]
    return np.array(distinct, dtype=np.int64), np.array(inverse, dtype=np.int64)
