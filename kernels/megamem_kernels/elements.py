"""Elements of activations in CPU kernels: fp32, and bf16 as its bits in a uint16; arithmetic on them is fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from megamem_kernels.jit import njit

_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(0.5)
_ONE, _LIMIT = np.float32(1), np.float32(87)
_EXPONENT, _BIAS = np.int32(23), np.int32(127)


def elements(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous fp32 or bf16 CPU tensor, in its shape: what :func:`load` and :func:`store` work on."""
    assert tensor.is_contiguous()
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def load(element: Any) -> Any:
    """The fp32 value of an element; exists in compiled functions only."""
    raise TypeError("load is for compiled functions")


def store(array: Any, index: int, value: Any) -> None:
    """Put an fp32 value into ``array[index]``, bf16 rounded to nearest even; exists in compiled functions only."""
    raise TypeError("store is for compiled functions")


@overload(load, strict=False)
def _load(element: Any) -> Callable:
    if element == types.uint16:
        return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    return lambda element: element


@overload(store, strict=False)
def _store(array: Any, index: Any, value: Any) -> Callable:
    if array.dtype != types.uint16:

        def store_fp32(array: Any, index: Any, value: Any) -> None:
            array[index] = value

        return store_fp32

    def store_bf16(array: Any, index: Any, value: Any) -> None:
        bits = np.float32(value).view(np.uint32)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        array[index] = np.uint16(rounded if value == value else np.uint32(0x7FC0))

    return store_bf16


@njit(nogil=True, error_model="numpy")
def sigmoid(x: np.float32) -> np.float32:
    """``1 / (1 + exp(-x))`` in fp32 to 2 units in the last place; below -87 it stays at that of -87, 1.6e-38.

    Loops over it vectorise, which those over the C library's ``exp`` do not. Range reduction and polynomial are those of
    ``expf`` in Cephes (Moshier).
    """
    y = min(max(-x, -_LIMIT), _LIMIT)
    k = np.rint(y * _LOG2_E)
    r = y - k * _LN2_HIGH - k * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = np.int32((np.int32(k) + _BIAS) << _EXPONENT).view(np.float32)
    return _ONE / (_ONE + (p * r * r + r + _ONE) * power)
