"""The two forms of RMSNorm: zero-centred weights, and plain scales."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megamem.models.norm import RMSNorm


def norm(*, zero_centered: bool, dtype: torch.dtype = torch.float32, override: bool | None = None) -> RMSNorm:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        params_dtype=dtype,
        layernorm_zero_centered_gamma=zero_centered,
    )
    return RMSNorm(config, 7, 1e-5, zero_centered=override)


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_start_as_the_same_function(zero_centered: bool, dtype: torch.dtype) -> None:
    module = norm(zero_centered=zero_centered, dtype=dtype)
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(module(x), expected.to(dtype))
    assert torch.equal(module.weight, torch.full((7,), 0.0 if zero_centered else 1.0, dtype=dtype))


def test_a_plain_scale_is_the_weight_bit_for_bit() -> None:
    weight = torch.randn(7, generator=torch.Generator().manual_seed(1))
    plain, centred = norm(zero_centered=False), norm(zero_centered=True)
    plain.weight.data.copy_(weight)
    centred.weight.data.copy_(weight)
    x = torch.eye(7)
    scale = 1 / (1 / 7 + 1e-5) ** 0.5
    torch.testing.assert_close(plain(x).diagonal(), weight * scale)
    torch.testing.assert_close(centred(x).diagonal(), (1 + weight) * scale)


def test_norms_of_memories_do_not_follow_the_backbone() -> None:
    assert norm(zero_centered=False, override=True).zero_centered
    assert norm(zero_centered=False, override=True).weight.init_value == 0.0  # type: ignore[attr-defined]
