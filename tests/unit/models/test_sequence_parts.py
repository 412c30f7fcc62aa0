"""Parts of sequences, as context-parallel ranks hold them: attention of all parts is the attention of the whole."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megamem.errors import ConfigError
from megamem.memory.config import BankConfig, MemoryConfig
from megamem.models.attention import CoreAttention, flash, sdpa
from megamem.models.checks import check_model
from megamem.models.config import ModelConfig
from megamem.models.micro import MicroContext
from megamem.parallel.layout import Layout

LENGTH, HEADS, GROUPS, WIDTH = 12, 6, 2, 4
DOCUMENTS = {
    "whole sequences": [[12], [12]],
    "a boundary at a cut": [[6, 6], [4, 8]],
    "boundaries around cuts": [[5, 1, 6], [3, 6, 3]],
    "a document over all parts": [[1, 10, 1], [2, 9, 1]],
    "one-token documents": [[1] * 12, [11, 1]],
}


def document_ids(lengths: list[list[int]]) -> Tensor:
    flat = torch.tensor([n for row in lengths for n in row])
    return torch.arange(len(flat), dtype=torch.int32).repeat_interleave(flat).view(len(lengths), -1)


def plain(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """``[b, s, h, d]`` and a mask that broadcasts to ``[b, h, queries, keys]``."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, -math.inf).softmax(-1), value)


def fake_flash_attn() -> ModuleType:
    """flash-attn's two functions as its documentation defines them: with ``causal`` the last query sees the last key."""

    def lower_right(queries: int, keys: int) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    def func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None, causal: bool) -> Tensor:
        assert causal and softmax_scale is None
        return plain(q, k, v, lower_right(q.shape[1], k.shape[1])).contiguous()

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float | None,
        causal: bool,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and q.ndim == k.ndim == 3
        q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max_seqlen_q, max_seqlen_k) == (max(q_lengths), max(k_lengths))
        pieces = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
        return torch.cat(
            [func(*(x[None] for x in piece), softmax_scale=softmax_scale, causal=causal)[0] for piece in pieces]
        )

    module = ModuleType("flash_attn")
    vars(module).update(flash_attn_func=func, flash_attn_varlen_func=varlen)
    return module


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 2)], ids=["b2", "b1"])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_parts_attend_like_the_whole(
    backend: str, parts: int, rows: slice, lengths: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    ids = document_ids(lengths)[rows]
    generator = torch.Generator().manual_seed(0)
    shapes = [(LENGTH, len(ids), heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    outputs = []
    for part in range(parts):
        context = MicroContext(document_ids=ids, part=part, parts=parts)
        query, *both = inputs[0][context.positions], *(x[: context.positions.stop] for x in inputs[1:])
        outputs.append({"sdpa": sdpa, "flash": flash}[backend](query, *both, context, None))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    visible = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
    expected = plain(*(x.transpose(0, 1) for x in exact), visible).transpose(0, 1).flatten(2)
    torch.testing.assert_close(torch.cat(outputs).double(), expected, atol=1e-5, rtol=1e-5)
    torch.cat(outputs).square().sum().backward()
    expected.square().sum().backward()
    for x, reference in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, atol=1e-5, rtol=1e-5)


def test_segments_of_a_part() -> None:
    ids = document_ids([[5, 1, 6], [3, 6, 3]])
    context = MicroContext(document_ids=ids, part=1, parts=2)
    queries, keys, longest_query, longest_key, first_keys = context.segments
    assert queries.tolist() == [0, 6, 9, 12]  # 6 of the third document; 3 and 3 of the last two
    assert keys.tolist() == [0, 6, 12, 15]  # of which the fifth document began 3 tokens before the part
    assert (longest_query, longest_key, first_keys) == (6, 6, [6, 3])


def test_a_context_of_other_parts_is_refused() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    attention = CoreAttention(config, backend="sdpa", layer_number=1, pg_collection=ProcessGroupCollection(cp=None))
    context = MicroContext(document_ids=torch.zeros(1, 4, dtype=torch.int32), part=1, parts=2)
    with pytest.raises(ValueError, match="context of 2 parts in a context-parallel group of 1"):
        attention(*torch.zeros(3, 2, 1, 2, 4).unbind(), None, packed_seq_params=context)


@pytest.mark.parametrize(
    ("length", "layout", "sequence_parallel", "bank", "message"),
    [
        (9, {"cp": 2}, False, False, "context_parallel_size=2, over"),
        (6, {"cp": 2, "tp": 2}, False, True, "context_parallel_size=2 x parallel.tensor_model_parallel_size=2"),
        (6, {"cp": 2, "tp": 2}, True, False, "context_parallel_size=2 x parallel.tensor_model_parallel_size=2"),
        (6, {"cp": 2, "tp": 2}, False, False, None),
        (12, {"cp": 2, "tp": 2}, True, True, None),
    ],
)
def test_sequences_must_fit_the_cuts(
    length: int, layout: dict[str, int], sequence_parallel: bool, bank: bool, message: str | None
) -> None:
    def check() -> None:
        check_model(
            ModelConfig(vocab_size=64),
            MemoryConfig(bank=BankConfig(units=[2] if bank else [])),
            Layout(world_size=math.prod(layout.values()), **layout),
            seq_length=length,
            sequence_parallel=sequence_parallel,
        )

    if message is None:
        check()
    else:
        with pytest.raises(ConfigError, match=f"sequence length {length} is not a multiple of .*{message}"):
            check()
