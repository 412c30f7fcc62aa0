"""Rows by index: compiled and Triton against torch."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import pytest
import torch
from torch import Tensor

from megamem_kernels.formats import FormatName, bits_of, row_fields
from megamem_kernels.parallel import set_threads
from megamem_kernels.row_gather import copy_rows, cpu, dequantize_rows, gather_rows, op, scatter_rows
from megamem_kernels.row_gather.reference import gather_rows as reference
from megamem_kernels.row_gather.triton import copy_rows_triton, gather_rows_triton, scatter_rows_triton

FORMATS: list[FormatName] = ["fp32", "bf16", "fp8"]
OUTPUTS = [torch.float32, torch.bfloat16]


def stored(name: FormatName, slots: int, width: int) -> dict[str, Tensor]:
    """Rows of random bits without NaN and infinity, scales of every size that fp32 holds."""
    generator = torch.Generator().manual_seed(slots * 1000 + width)
    fields = {field.name: field.allocate(slots) for field in row_fields(name, width)}
    for field, tensor in fields.items():
        tensor.view(torch.uint8).random_(0, 247 if field == "scales" else 256, generator=generator)
    rows = fields["rows"]
    bits_of(rows)[~np.isfinite(rows.float().numpy())] = 0
    return fields


def positions(slots: int, count: int) -> Tensor:
    return torch.randint(slots, (count,), generator=torch.Generator().manual_seed(count))


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranges even of a few rows."""
    monkeypatch.setattr(op, "_GRAIN_BYTES", 1)
    set_threads(request.param)
    request.addfinalizer(lambda: set_threads(0))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, ()),
        (torch.uint8, (1,)),
        (torch.bfloat16, (7,)),
        (torch.bfloat16, (33,)),
        (torch.bfloat16, (80,)),
        (torch.bfloat16, (128,)),
        (torch.float32, (3, 24)),
        (torch.float8_e4m3fn, (160,)),
        (torch.int64, (5,)),
    ],
)
@pytest.mark.parametrize("count", [0, 1, 45])
def test_rows_are_copied_and_put_back_byte_for_byte(
    count: int, dtype: torch.dtype, shape: tuple[int, ...], streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_STREAMED_BYTES", 0 if streamed else 1 << 60)
    table = torch.randint(256, (61, *shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(61, *shape)
    index = positions(61, count)
    expected = bits_of(table)[index.numpy()]
    for form in (copy_rows, copy_rows_triton):
        guarded = torch.full((count + 2, *shape, dtype.itemsize), 0xFF, dtype=torch.uint8)
        if not streamed:  # starts away from any alignment; streaming needs it
            guarded = torch.full((guarded.numel() + 1,), 0xFF, dtype=torch.uint8)[dtype.itemsize :][: guarded.numel()]
        out = guarded.view(torch.uint8).reshape(-1)[: count * max(1, table[0].nbytes)].view(dtype).view(count, *shape)
        form(table, index, out)
        assert bits_of(out).tobytes() == expected.tobytes()
        assert (guarded.reshape(-1)[out.nbytes :] == 0xFF).all(), "wrote beyond its rows"
    distinct = torch.randperm(61)[:count]
    for scatter in (scatter_rows, scatter_rows_triton):
        target = torch.zeros_like(table)
        values = copy_rows(table, distinct, torch.empty_like(table[:count]))
        scatter(target, distinct, values)
        assert bits_of(target)[distinct.numpy()].tobytes() == bits_of(values).tobytes()
        rest = np.delete(bits_of(target), distinct.numpy(), axis=0)
        assert not np.any(np.frombuffer(rest.tobytes(), dtype=np.uint8))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("width", [1, 7, 33, 160])
@pytest.mark.parametrize("count", [0, 1, 45])
def test_rows_are_decoded(count: int, width: int, name: FormatName, dtype: torch.dtype) -> None:
    fields = stored(name, 61, width)
    index = positions(61, count)
    expected = reference(fields, index, torch.empty(count, width, dtype=dtype))
    out = torch.full((count, width), torch.nan, dtype=dtype)
    assert gather_rows(fields, index, out) is out
    assert torch.equal(out, expected)
    if dtype != fields["rows"].dtype:
        out = torch.full((count, width), torch.nan, dtype=dtype)
        gather_rows_triton(fields, index, out)
        assert torch.equal(out, expected)
    everything = torch.full((61, width), torch.nan, dtype=dtype)
    dequantize_rows(fields, everything)
    assert torch.equal(everything, reference(fields, torch.arange(61), torch.empty_like(everything)))


@pytest.mark.parametrize("form", [gather_rows, gather_rows_triton])
def test_every_fp8_code_and_scale(form: object) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(torch.float8_e4m3fn)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    out = torch.zeros(256, 256)
    assert callable(form)
    with np.errstate(over="ignore", invalid="ignore"):
        form({"rows": codes, "scales": scales}, torch.arange(256), out)
    expected = codes.float() * scales.view(torch.float8_e8m0fnu).float().repeat_interleave(32, dim=1)
    np.testing.assert_array_equal(out.numpy(), expected.numpy())


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_whose_offset_is_beyond_32_bits(streamed: bool) -> None:
    # Zero pages that are never touched cost nothing: 4.3 GB of address space, a few pages of memory.
    slots, width = 2**25 + 3, 128
    table = torch.from_numpy(np.zeros((slots, width), dtype=np.uint8))
    table[-1] = torch.arange(width)
    table[2**24 + 1] = 7
    index = torch.tensor([slots - 1, 0, 2**24 + 1, slots - 1])
    out = torch.full((4, width), 255, dtype=torch.uint8)
    kernel = cpu.stream_rows if streamed else cpu.copy_rows
    kernel(table.numpy(), index.numpy(), out.numpy(), 0, 4)
    assert torch.equal(out, table[index])
    scatter_rows(table, torch.tensor([slots - 2]), out[:1])
    assert torch.equal(table[-2], table[-1])
    copied = torch.full((4, width), 255, dtype=torch.uint8)
    copy_rows_triton(table, index, copied)
    assert torch.equal(copied, out)
    decoded = gather_rows({"rows": table.view(torch.bfloat16)}, index, torch.full((4, width // 2), torch.nan))
    assert torch.equal(decoded, table[index].view(torch.bfloat16).float())


def test_wrong_arguments_are_refused() -> None:
    table, index = torch.zeros(9, 4), torch.arange(3)
    with pytest.raises(ValueError, match="index"):
        copy_rows(table, index.int(), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="index"):
        copy_rows(table, index, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="table"):
        copy_rows(table.double(), index, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="table"):
        scatter_rows(table[:, :2], index, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="rows"):
        copy_rows(table, index, torch.zeros(3, 8)[:, ::2])
    with pytest.raises(ValueError, match="int32"):
        gather_rows({"rows": table}, index, torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="float8"):
        gather_rows(stored("fp8", 9, 4), index, torch.zeros(3, 4, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="scales"):
        gather_rows({**stored("fp8", 9, 64), "scales": torch.zeros(9, 1, dtype=torch.uint8)}, index, torch.zeros(3, 64))
