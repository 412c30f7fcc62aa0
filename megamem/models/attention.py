"""Causal attention within documents: torch SDPA or flash-attn, behind megatron-core's core-attention interface.

Under context parallelism each rank has the queries of a contiguous part of every sequence, and gathers the keys and values of
all parts (arXiv 2407.21783, section 3.3.2): exact for any packing, one message per layer, and with grouped queries a small one.
Later parts see more keys than earlier ones and so have more to compute, up to twice the mean: the price of parts that n-grams and
convolutions can cross with nothing but their left neighbours' last tokens.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size
from torch import Tensor

from megamem.errors import ConfigError
from megamem.models.config import ModelConfig
from megamem.models.micro import MicroContext

logger = logging.getLogger(__name__)
_FLASH_VERSION = (2, 1)  # from here on, causal masks of fewer queries than keys end at the last key
_FLASH_HEAD_DIM = 256  # the widest head that flash-attn 2 has kernels for


def choose_backend(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """``"sdpa"`` or ``"flash"`` for ``model.attention_backend``; ConfigError where flash is set and cannot run."""
    obstacle = _flash_obstacle(model, device, dtype)
    if model.attention_backend == "flash" and obstacle:
        raise ConfigError(f"model.attention_backend is flash, but {obstacle}; set it to auto or sdpa")
    if model.attention_backend != "auto":
        return model.attention_backend
    backend = "sdpa" if obstacle else "flash"
    logger.info("attention backend: %s%s", backend, f" ({obstacle})" if obstacle else "")
    return backend


def _flash_obstacle(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "there is no CUDA device"
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn is not installed"
    if tuple(map(int, version.split(".")[:2])) < _FLASH_VERSION:
        return f"flash-attn {version} is older than {'.'.join(map(str, _FLASH_VERSION))}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn does not compute in {str(dtype).removeprefix('torch.')}"
    if model.head_dim > _FLASH_HEAD_DIM:
        return f"attention heads are {model.head_dim} wide and flash-attn takes {_FLASH_HEAD_DIM} at most"
    return ""


class CoreAttention(MegatronModule):
    """Scaled dot-product attention of grouped queries, causal, never across document ids. No parameters, no dropout."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        backend: str,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        """Without ``pg_collection`` every rank holds whole sequences."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale  # None is 1 / sqrt(head width) for both backends
        self.attend = {"sdpa": sdpa, "flash": flash}[backend]
        self.cp_group = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: MicroContext | None = None,
        **unused: Any,
    ) -> Tensor:
        """``query [s / cp, b, heads, d]``, ``key`` and ``value [s / cp, b, groups, d]`` to ``[s / cp, b, heads * d]``.

        Query head ``i`` reads group ``i // (heads / groups)``. Without a context every sequence is one document.

        Raises:
            ValueError: there is an attention mask, or the context does not name this rank's part of the sequences.
        """
        if attention_mask is not None:
            raise ValueError("documents come from the MicroContext: pass attention_mask=None")
        parts = 1 if packed_seq_params is None else packed_seq_params.parts
        if parts != get_pg_size(self.cp_group):
            raise ValueError(f"a context of {parts} parts in a context-parallel group of {get_pg_size(self.cp_group)}")
        if packed_seq_params is not None and parts > 1:
            stop = packed_seq_params.positions.stop
            both = torch.cat((key, value), dim=-1)  # one message; backward sums every rank's share and scatters it
            both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=self.cp_group)
            key, value = both[:stop].chunk(2, dim=-1)
        return self.attend(query, key, value, packed_seq_params, self.softmax_scale)


def sdpa(query: Tensor, key: Tensor, value: Tensor, context: MicroContext | None, scale: float | None) -> Tensor:
    """Attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Shapes as in :meth:`CoreAttention.forward`, but keys and values ``[stop, b, groups, d]`` are those of all positions up to
    the last query.
    """
    mask = None if context is None else context.attention_mask(query.dtype)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and mask is not None and mask.is_cuda:
        # The one CUDA kernel of SDPA that takes a mask in linear memory wants as many key heads as query heads.
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def flash(query: Tensor, key: Tensor, value: Tensor, context: MicroContext | None, scale: float | None) -> Tensor:
    """Attention by flash-attn, documents as variable-length sequences; shapes as in :func:`sdpa`.

    Where there are more keys than queries, ``causal`` lets the last query see the last key (flash-attn 2.1 and later).
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    s, b = query.shape[:2]
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if context is None or context.is_causal:
        out = flash_attn_func(query, key, value, softmax_scale=scale, causal=True)
    else:
        segments = context.segments
        out = flash_attn_varlen_func(
            query.reshape(b * s, *query.shape[2:]),
            _join(key, segments.first_keys),
            _join(value, segments.first_keys),
            segments.query_starts,
            segments.key_starts,
            segments.longest_query,
            segments.longest_key,
            softmax_scale=scale,
            causal=True,
        )
    return out.view(b, s, -1).transpose(0, 1).contiguous()


def _join(x: Tensor, firsts: list[int]) -> Tensor:
    """``[b, s, ...]`` to one sequence of what begins at position ``firsts[i]`` of sequence ``i``."""
    if len(firsts) == 1:
        return x[0, firsts[0] :]
    return torch.cat([sequence[first:] for sequence, first in zip(x, firsts, strict=True)])
