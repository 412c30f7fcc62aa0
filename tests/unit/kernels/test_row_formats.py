"""Formats of stored rows: their fields, their names, and what numpy sees of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megamem_kernels.formats import FormatName, bits_of, format_of, require, row_fields


@pytest.mark.parametrize(
    ("name", "width", "nbytes"), [("fp32", 7, 28), ("bf16", 80, 160), ("fp8", 256, 264), ("fp8", 33, 35)]
)
def test_fields_allocate_the_bytes_of_a_row(name: FormatName, width: int, nbytes: int) -> None:
    fields = row_fields(name, width)
    assert sum(field.nbytes for field in fields) == nbytes
    arrays = {field.name: field.allocate(3) for field in fields}
    assert sum(array.nbytes for array in arrays.values()) == 3 * nbytes
    assert all(array.is_contiguous() and not bits_of(array).any() for array in arrays.values())
    assert format_of(arrays) == name


def test_a_format_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        row_fields("int8", 4)  # type: ignore[arg-type]
    for fields in (
        {"rows": torch.zeros(2, 4, dtype=torch.float16)},
        {"rows": torch.zeros(2, 4, dtype=torch.float8_e4m3fn)},
        {"rows": torch.zeros(2, 4), "scales": torch.zeros(2, 1, dtype=torch.uint8)},
    ):
        with pytest.raises(ValueError, match="no row format stores"):
            format_of(fields)


@pytest.mark.parametrize(
    ("dtype", "seen"), [(torch.bfloat16, np.uint16), (torch.float8_e4m3fn, np.uint8), (torch.float32, np.float32)]
)
def test_bits_share_memory_with_the_tensor(dtype: torch.dtype, seen: type) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    bits = bits_of(tensor)
    assert bits.dtype == seen
    assert bits.shape == (3, 5)
    bits[1, 2] = 64
    assert tensor[1, 2] != 0
    assert tensor.float().count_nonzero() == 1


def test_require_names_the_argument_and_what_it_must_be() -> None:
    cpu = torch.device("cpu")
    require("values", torch.zeros(2, 3), torch.float32, (2, 3), cpu)
    for tensor in (
        torch.zeros(3, 2).T,
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 4),
        torch.zeros(2, 3, device="meta"),
    ):
        with pytest.raises(ValueError, match=r"values is .* must be contiguous torch.float32 \(2, 3\) on cpu"):
            require("values", tensor, torch.float32, (2, 3), cpu)
