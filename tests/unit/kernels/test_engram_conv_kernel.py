"""The Engram convolution, compiled for the CPU and in Triton, against its definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamem_kernels.engram_conv import engram_conv, op
from megamem_kernels.engram_conv.reference import engram_conv_reference
from megamem_kernels.parallel import set_threads

DEVICES = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
"""Without a CUDA device Triton's interpreter runs on CPU tensors (tests/conftest.py)."""
ROUNDING = {"cpu": 2**-8 + 1e-4, "triton": 2**-7 + 1e-4}
"""Relative error of one rounding to bf16, and of fp32 before it: Triton's interpreter cuts bits off."""
NAMES = ("output", "gated", "norm", "weight")
DILATION = 3


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Whatever a kernel leaves unwritten in its outputs is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form that runs on ``DEVICES[backend]``."""
    if request.param == "triton":
        form = pytest.importorskip("megamem_kernels.engram_conv.triton")
        monkeypatch.setattr(op, "_backend", lambda tensor: form)
    return request.param


def inputs(positions: int, batch: int, width: int, taps: int = 4, dtype: torch.dtype = torch.float32):
    """Gated values, the norm's scale and the taps; and document ids that int32 could not tell apart."""
    generator = torch.Generator().manual_seed(positions + width)
    gated = torch.randn(positions, batch, width, generator=generator).to(dtype)
    norm, weight = torch.randn(width, generator=generator) * 0.3, torch.randn(width, taps, generator=generator)
    documents = (torch.rand(batch, positions, generator=generator) < 0.1).cumsum(1) * 2**32
    return [gated, norm, weight], documents


def run(
    function, tensors: list[Tensor], documents: Tensor, upstream: Tensor, context: int = 0, *, backend: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs and the gradients of every input, on the CPU; ``upstream`` is for all positions."""
    leaves = [tensor.detach().clone().to(DEVICES[backend]).requires_grad_() for tensor in tensors]
    gated, norm, weight = leaves
    output = function(gated, documents.to(gated.device), norm, weight, context=context, dilation=DILATION, epsilon=1e-5)
    gradients = torch.autograd.grad(output, leaves, upstream[context:].to(output))
    return {name: tensor.detach().cpu() for name, tensor in zip(NAMES, [output, *gradients], strict=True)}


def expected(tensors: list[Tensor], documents: Tensor, upstream: Tensor, context: int = 0) -> dict[str, Tensor]:
    """The same by the definition in float64."""
    return run(engram_conv_reference, [tensor.double() for tensor in tensors], documents, upstream, context)


def test_reference_is_the_convolution_of_torch_within_one_document() -> None:
    (gated, norm, weight), _ = inputs(23, 2, 5)
    normed = F.rms_norm(gated, (5,), 1 + norm, 1e-5)
    columns = F.pad(normed.permute(1, 2, 0), (3 * DILATION, 0))
    convolved = F.conv1d(columns, weight.unsqueeze(1), dilation=DILATION, groups=5).permute(2, 0, 1)
    settings = {"context": 0, "dilation": DILATION, "epsilon": 1e-5}
    output = engram_conv_reference(gated, torch.zeros(2, 23, dtype=torch.int32), norm, weight, **settings)
    torch.testing.assert_close(output, F.silu(convolved) + gated)


def test_reference_gradient_by_finite_differences() -> None:
    tensors, documents = inputs(12, 2, 3)
    leaves = [tensor.double().requires_grad_() for tensor in tensors]

    def function(gated: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        return engram_conv_reference(gated, documents, norm, weight, context=2, dilation=DILATION, epsilon=1e-5)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("positions", "batch", "width", "taps", "context"),
    [
        (1, 1, 1, 4, 0),
        (0, 2, 7, 4, 0),
        (5, 2, 7, 4, 5),
        (5, 3, 7, 1, 0),
        (23, 2, 33, 4, 0),
        (23, 2, 33, 3, 4),
        (23, 2, 33, 4, 9),
        (40, 2, 160, 4, 13),
        (9, 1, 300, 2, 0),
    ],
)
def test_outputs_and_gradients(
    positions: int, batch: int, width: int, taps: int, context: int, backend, monkeypatch
) -> None:
    tensors, documents = inputs(positions, batch, width, taps)
    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(9))
    actual = run(engram_conv, tensors, documents, upstream, context)
    wanted = expected(tensors, documents, upstream, context)
    assert actual["output"].shape == (positions - context, batch, width)
    for name in NAMES:
        torch.testing.assert_close(actual[name].double(), wanted[name], atol=1e-5, rtol=1e-5)


def test_bf16(backend: str) -> None:
    tensors, documents = inputs(23, 2, 33, dtype=torch.bfloat16)
    upstream = torch.randn(23, 2, 33).bfloat16()
    actual, wanted = (
        run(engram_conv, tensors, documents, upstream, backend=backend),
        expected(tensors, documents, upstream),
    )
    assert actual["output"].dtype == actual["gated"].dtype == torch.bfloat16
    for name in ("output", "gated"):
        torch.testing.assert_close(actual[name].double(), wanted[name], atol=1e-5, rtol=ROUNDING[backend])
    for name in ("norm", "weight"):
        torch.testing.assert_close(actual[name].double(), wanted[name], atol=1e-4, rtol=1e-4)


def test_bf16_parameters_get_bf16_gradients() -> None:
    tensors, documents = inputs(23, 2, 33)
    tensors[1:] = [tensor.bfloat16() for tensor in tensors[1:]]
    upstream = torch.ones_like(tensors[0])
    actual, wanted = run(engram_conv, tensors, documents, upstream), expected(tensors, documents, upstream)
    assert actual["norm"].dtype == actual["weight"].dtype == torch.bfloat16
    for name in NAMES:
        torch.testing.assert_close(actual[name].double(), wanted[name], atol=1e-5, rtol=2**-8 + 1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # to infinity, as meant
def test_sums_of_any_size_stay_finite(backend: str) -> None:
    tensors, documents = inputs(23, 2, 33)
    tensors[2] *= 300
    upstream = torch.ones_like(tensors[0])
    actual, wanted = (
        run(engram_conv, tensors, documents, upstream, backend=backend),
        expected(tensors, documents, upstream),
    )
    for name in NAMES:
        torch.testing.assert_close(actual[name].double(), wanted[name], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    tensors, documents = inputs(500, 2, 160, dtype=dtype)
    upstream = torch.randn(500, 2, 160)
    results = []
    for threads in (1, 3):
        set_threads(threads)
        results.append(run(engram_conv, tensors, documents, upstream))
    set_threads(0)
    assert all(torch.equal(results[0][name], results[1][name]) for name in NAMES)


@pytest.mark.parametrize("context", [9, 14])
def test_a_slice_with_its_left_context_equals_the_whole(context: int, backend: str) -> None:
    """What ranks of a tensor-parallel group do: outputs are bit-equal, and gradients add up to those of the whole."""
    tensors, documents = inputs(40, 2, 33)
    upstream = torch.randn(40, 2, 33)
    whole = run(engram_conv, tensors, documents, upstream, backend=backend)
    total = {name: torch.zeros_like(whole[name]) for name in NAMES}
    for start, stop in ((0, 17), (17, 40)):
        left = min(context, start)
        part = slice(start - left, stop)
        cut = [tensors[0][part], *tensors[1:]]
        result = run(engram_conv, cut, documents[:, part], upstream[part], left, backend=backend)
        assert torch.equal(result["output"], whole["output"][start:stop])
        total["gated"][part] += result["gated"]
        for name in ("norm", "weight"):
            total[name] += result[name]
    for name in NAMES[1:]:
        torch.testing.assert_close(total[name], whole[name], atol=1e-5, rtol=1e-5)


def test_strided_inputs() -> None:
    (gated, norm, weight), documents = inputs(12, 3, 7)
    plain = run(engram_conv, [gated, norm, weight], documents, torch.ones_like(gated))
    strided = gated.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    documents = documents.t().contiguous().t()
    output = engram_conv(strided, documents, norm, weight, context=0, dilation=DILATION, epsilon=1e-5)
    output.sum().backward()
    assert torch.equal(output, plain["output"]) and torch.equal(strided.grad, plain["gated"])


def test_inputs_that_do_not_fit() -> None:
    (gated, norm, weight), documents = inputs(12, 3, 7)
    settings = {"context": 0, "dilation": DILATION, "epsilon": 1e-5}
    with pytest.raises(ValueError, match=r"documents is \[3, 11\]"):
        engram_conv(gated, documents[:, 1:], norm, weight, **settings)
    with pytest.raises(ValueError, match=r"weight is \[6, 4\]"):
        engram_conv(gated, documents, norm, weight[:6], **settings)
    with pytest.raises(ValueError, match="13 positions of context among 12"):
        engram_conv(gated, documents, norm, weight, **settings | {"context": 13})
    with pytest.raises(ValueError, match="4 taps 0 positions apart"):
        engram_conv(gated, documents, norm, weight, **settings | {"dilation": 0})
    with pytest.raises(ValueError, match="neither fp32 nor bf16"):
        engram_conv(gated.double(), documents, norm, weight, **settings)
