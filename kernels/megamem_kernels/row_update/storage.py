"""How compiled updates change a stored row: opened as fp32, changed in place, closed with stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types, uint64
from numba.extending import overload

from megamem_kernels.formats import ROWS, SCALES, bits_of
from megamem_kernels.random import row_key
from megamem_kernels.rounding.cpu import load_bf16, load_fp8, random_lanes, store_bf16, store_fp8
from megamem_kernels.row_update.touched import TouchedRows


class Stored(NamedTuple):
    """Rows in their storage format, for compiled functions."""

    rows: np.ndarray
    """``[slots, width]`` float32, or bf16 as its bits in uint16, or E4M3 as its bits in uint8."""
    scales: np.ndarray
    """``[slots, ceil(width / 32)]`` uint8 beside E4M3; else empty."""
    slots: np.ndarray
    """``[u]`` int64: where the rows of an update are."""
    ids: np.ndarray
    """``[u]`` int64: their logical ids."""
    key: np.uint64
    """Keys stochastic rounding together with ``step`` and the ids."""
    step: np.uint64
    """The optimizer step."""


_NO_SCALES = np.empty((0, 0), np.uint8)


def stored(rows: TouchedRows, step: int) -> Stored:
    """The rows of one update, on the CPU."""
    return Stored(
        bits_of(rows.fields[ROWS]),
        bits_of(rows.fields[SCALES]) if SCALES in rows.fields else _NO_SCALES,
        rows.slots.numpy(),
        rows.ids.numpy(),
        np.uint64(rows.key),
        np.uint64(step),
    )


def open_row(stored: Any, i: int, scratch: Any) -> Any:
    """The values of the ``i``-th row of an update, fp32 ``[width]``: the row itself, or ``scratch`` with the decoded row."""
    raise TypeError("open_row is for compiled functions")


def close_row(stored: Any, i: int, values: Any, words: Any) -> None:
    """Store what :func:`open_row` gave, after it was changed in place; ``words``: scratch uint64 ``[ceil(width / 4)]``."""
    raise TypeError("close_row is for compiled functions")


@overload(open_row, strict=False)
def _open_row(stored: Any, i: Any, scratch: Any) -> Callable:
    dtype = stored[0].dtype
    if dtype == types.float32:
        return lambda stored, i, scratch: stored.rows[stored.slots[i]]
    if dtype == types.uint16:

        def open_bf16(stored: Any, i: Any, scratch: Any) -> Any:
            load_bf16(stored.rows[stored.slots[i]], scratch)
            return scratch

        return open_bf16

    def open_fp8(stored: Any, i: Any, scratch: Any) -> Any:
        slot = stored.slots[i]
        load_fp8(stored.rows[slot], stored.scales[slot], scratch)
        return scratch

    return open_fp8


@overload(close_row, strict=False)
def _close_row(stored: Any, i: Any, values: Any, words: Any) -> Callable:
    dtype = stored[0].dtype
    if dtype == types.float32:
        return lambda stored, i, values, words: None
    if dtype == types.uint16:

        def close_bf16(stored: Any, i: Any, values: Any, words: Any) -> None:
            lanes = random_lanes(row_key(stored.key, stored.step, uint64(stored.ids[i])), words)
            store_bf16(values, lanes, False, stored.rows[stored.slots[i]])

        return close_bf16

    def close_fp8(stored: Any, i: Any, values: Any, words: Any) -> None:
        slot = stored.slots[i]
        lanes = random_lanes(row_key(stored.key, stored.step, uint64(stored.ids[i])), words)
        store_fp8(values, lanes, False, stored.rows[slot], stored.scales[slot])

    return close_fp8
