"""The Engram gate, compiled for the CPU and in Triton, against its definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megamem_kernels.engram_gate import engram_gate, op
from megamem_kernels.engram_gate.reference import engram_gate_reference
from megamem_kernels.parallel import set_threads

DEVICES = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
"""Without a CUDA device Triton's interpreter runs on CPU tensors (tests/conftest.py)."""
ROUNDING = {"cpu": 2**-8 + 1e-4, "triton": 2**-7 + 1e-4}
"""Relative error of one rounding to bf16, and of fp32 before it: Triton's interpreter cuts bits off."""
NAMES = ("gated", "gate", "hidden", "key", "value", "norm_query", "norm_key")


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
        form = pytest.importorskip("megamem_kernels.engram_gate.triton")
        monkeypatch.setattr(op, "_backend", lambda tensor: form)
    return request.param


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Hidden states, keys that fit them well or badly, values, and both norms' scales."""
    generator = torch.Generator().manual_seed(seed)
    hidden, noise, value = (torch.randn(shape, generator=generator) for _ in range(3))
    sign = torch.randn(*shape[:-1], 1, generator=generator).sign()
    norms = [torch.randn(shape[-1], generator=generator) * 0.3 for _ in range(2)]
    return [tensor.to(dtype) for tensor in (hidden, hidden * sign + noise / 2, value)] + norms


def run(
    function, tensors: list[Tensor], upstream: Tensor, *, sqrt_gate: bool = True, backend: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs and the gradients of every input, on the CPU."""
    leaves = [tensor.detach().clone().to(DEVICES[backend]).requires_grad_() for tensor in tensors]
    gated, gate = function(*leaves, epsilon=1e-5, sqrt_gate=sqrt_gate, scale=leaves[0].shape[-1] ** -0.5)
    gradients = torch.autograd.grad(gated, leaves, upstream.to(gated))
    return {name: tensor.detach().cpu() for name, tensor in zip(NAMES, [gated, gate, *gradients], strict=True)}


def expected(tensors: list[Tensor], upstream: Tensor, *, sqrt_gate: bool = True) -> dict[str, Tensor]:
    """The same by the definition in float64."""
    return run(engram_gate_reference, [tensor.double() for tensor in tensors], upstream, sqrt_gate=sqrt_gate)


def assert_close(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name in NAMES:
        scale = max(1.0, float(wanted[name].abs().max())) if wanted[name].numel() else 1.0
        torch.testing.assert_close(
            actual[name].double(),
            wanted[name],
            atol=tolerance * scale,
            rtol=tolerance,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("sqrt_gate", [True, False])
@pytest.mark.parametrize(("count", "width"), [(0, 7), (1, 1), (1, 160), (5, 7), (17, 33), (64, 1), (70, 160)])
def test_outputs_and_gradients(count: int, width: int, sqrt_gate: bool, backend: str) -> None:
    tensors, upstream = inputs(count, width), torch.randn(count, width, generator=torch.Generator().manual_seed(9))
    actual = run(engram_gate, tensors, upstream, sqrt_gate=sqrt_gate, backend=backend)
    assert_close(actual, expected(tensors, upstream, sqrt_gate=sqrt_gate), 2e-5)
    assert actual["gate"].dtype == torch.float32 and actual["gate"].shape == (count, 1)


def test_bf16(backend: str) -> None:
    tensors = inputs(37, 33, dtype=torch.bfloat16)
    upstream = torch.randn(37, 33).bfloat16()
    actual = run(engram_gate, tensors, upstream, backend=backend)
    wanted = expected(tensors, upstream)
    assert [actual[name].dtype for name in NAMES[2:]] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for name in ("gated", "hidden", "key", "value"):
        torch.testing.assert_close(actual[name].double(), wanted[name], atol=1e-6, rtol=ROUNDING[backend])
    for name in ("norm_query", "norm_key"):
        torch.testing.assert_close(actual[name].double(), wanted[name], atol=1e-4, rtol=1e-4)


def test_norms_keep_their_dtype() -> None:
    tensors = inputs(5, 7, dtype=torch.bfloat16)
    tensors[3:] = [tensor.bfloat16() for tensor in tensors[3:]]
    actual, upstream = run(engram_gate, tensors, torch.ones(5, 7)), torch.ones(5, 7)
    assert actual["norm_query"].dtype == torch.bfloat16
    wanted = expected(tensors, upstream)["norm_query"]
    torch.testing.assert_close(actual["norm_query"].double(), wanted, atol=1e-5, rtol=2**-8 + 1e-4)


@pytest.mark.parametrize("sqrt_gate", [True, False])
def test_reference_gradient_by_finite_differences(sqrt_gate: bool) -> None:
    leaves = [tensor.double().requires_grad_() for tensor in inputs(3, 5)]
    settings = {"epsilon": 1e-5, "sqrt_gate": sqrt_gate, "scale": 0.4}
    assert torch.autograd.gradcheck(lambda *tensors: engram_gate_reference(*tensors, **settings)[0], leaves)


@pytest.mark.parametrize("sqrt_gate", [True, False])
def test_empty_rows_and_scores_near_zero(sqrt_gate: bool, backend: str) -> None:
    hidden, key, value, *norms = inputs(6, 8)
    key[0] = 0.0
    hidden[1] = key[1] = 0.0
    hidden[2:5] = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    # Products that cancel, but for a difference that gives a score below, and then above, the clamp.
    for row, difference in ((2, 0.0), (3, -2e-7), (4, 1e-4)):
        key[row] = torch.tensor([1.0, difference - 1.0, 0, 0, 0, 0, 0, 0])
    norms = [torch.zeros(8), torch.zeros(8)]
    tensors, upstream = [hidden, key, value, *norms], torch.ones(6, 8)
    actual = run(engram_gate, tensors, upstream, sqrt_gate=sqrt_gate, backend=backend)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    assert (actual["gate"][:3] == 0.5).all()
    if sqrt_gate:
        torch.testing.assert_close(actual["gate"][3], torch.tensor([-1e-3]).sigmoid())
        assert not actual["hidden"][:4].any() and not actual["key"][:4].any()
        assert actual["hidden"][4].any() and actual["gate"][4] > 0.5
    wanted = expected(tensors, upstream, sqrt_gate=sqrt_gate)
    for name in ("gate", "hidden", "key", "value"):
        # The slope of the square root in row 4 is 60: a last bit of the score is seen.
        torch.testing.assert_close(actual[name].double(), wanted[name], atol=1e-5, rtol=5e-4)


def test_an_infinite_or_missing_number_stays_in_its_row(backend: str) -> None:
    tensors = inputs(4, 33)
    clean = run(engram_gate, tensors, torch.ones(4, 33), backend=backend)
    tensors[0][1, 32] = torch.nan
    dirty = run(engram_gate, tensors, torch.ones(4, 33), backend=backend)
    assert dirty["gated"][1].isnan().all() and dirty["norm_query"].isnan().all()
    assert torch.equal(dirty["gated"][[0, 2, 3]], clean["gated"][[0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    tensors, upstream = inputs(1000, 160, dtype=dtype), torch.randn(1000, 160)
    results = []
    for threads in (1, 3):
        set_threads(threads)
        results.append(run(engram_gate, tensors, upstream))
    set_threads(0)
    assert all(torch.equal(results[0][name], results[1][name]) for name in NAMES)


def test_a_row_depends_on_nothing_but_itself(backend: str) -> None:
    tensors, upstream = inputs(70, 33), torch.randn(70, 33)
    whole, part = run(engram_gate, tensors, upstream, backend=backend), slice(21, 67)
    cut = run(engram_gate, [tensor[part] for tensor in tensors[:3]] + tensors[3:], upstream[part], backend=backend)
    assert all(torch.equal(whole[name][part], cut[name]) for name in NAMES[:5])


def test_strided_inputs_of_three_dimensions() -> None:
    tensors, upstream = inputs(6, 3, 7), torch.randn(6, 3, 7)
    plain = run(engram_gate, tensors, upstream)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors[:3]] + tensors[3:]
    leaves = [tensor.requires_grad_() for tensor in strided]
    gated, gate = engram_gate(*leaves, epsilon=1e-5, sqrt_gate=True, scale=7**-0.5)
    assert gate.shape == (6, 3, 1) and not gate.requires_grad
    assert torch.equal(gated, plain["gated"])
    broadcast = torch.autograd.grad(gated, leaves[1], torch.ones(()).expand(6, 3, 7))[0]
    assert torch.equal(broadcast, run(engram_gate, tensors, torch.ones(6, 3, 7))["key"])


def test_inputs_that_do_not_fit() -> None:
    hidden, key, value, query, keyed = inputs(4, 6)
    settings = {"epsilon": 1e-5, "sqrt_gate": True, "scale": 1.0}
    with pytest.raises(ValueError, match=r"key is float32 \[3, 6\]"):
        engram_gate(hidden, key[:3], value, query, keyed, **settings)
    with pytest.raises(ValueError, match="value is bfloat16"):
        engram_gate(hidden, key, value.bfloat16(), query, keyed, **settings)
    with pytest.raises(ValueError, match="norm_key is float32"):
        engram_gate(hidden, key, value, query, keyed[:5], **settings)
    with pytest.raises(ValueError, match="neither fp32 nor bf16"):
        engram_gate(hidden.double(), key.double(), value.double(), query, keyed, **settings)
