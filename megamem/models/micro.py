"""Per-micro-batch data of the model, carried by the argument that every megatron layer already hands on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megamem.batch import MicroBatch

if TYPE_CHECKING:
    from megamem.memory.lookup import MicroMemory


@dataclass(kw_only=True, eq=False)
class MicroContext(PackedSeqParams):
    """What layers need beyond hidden states: documents and memory of one micro-batch, given as ``packed_seq_params``.

    The format is ``sbhd``: megatron-core takes its packed paths for ``thd`` alone, so activations stay ``[s, b, h]``
    and RoPE positions run on through the sequence.
    """

    document_ids: Tensor
    """``[b, s]`` int32, as in :class:`~megamem.batch.MicroBatch`: contiguous, never shared by two sequences."""
    memory: MicroMemory | None = None
    """Working sets of the micro-batch; None skips every memory module, so that the residual passes unchanged."""

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"
        self.max_seqlen_q = self.max_seqlen_kv = self.document_ids.shape[1]  # the length of megatron's RoPE table

    @classmethod
    def from_batch(cls, micro: MicroBatch, device: torch.device, memory: MicroMemory | None = None) -> MicroContext:
        """The context of ``micro`` on ``device``. Boundaries are found on the host: nothing waits for the device."""
        context = cls(document_ids=torch.from_numpy(micro.document_ids).to(device, non_blocking=True), memory=memory)
        context.document_starts = _document_starts(micro.document_ids)
        return context

    @cached_property
    def document_starts(self) -> np.ndarray:
        """``[documents + 1]`` int32 on the host: the first token of each document, in reading order, and the end."""
        return _document_starts(self.document_ids.cpu().numpy())

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """:attr:`document_starts` on the device of the document ids, as flash-attn takes it."""
        return torch.from_numpy(self.document_starts).to(self.document_ids.device, non_blocking=True)

    @cached_property
    def max_document_length(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.document_starts).max())

    @property
    def is_causal(self) -> bool:
        """Whether every sequence is one document, so that causality alone says what attention may see."""
        return len(self.document_starts) == len(self.document_ids) + 1

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """``[b, 1, s, s]`` bool, True where a query may see a key; None where :attr:`is_causal`."""
        if self.is_causal:
            return None
        same_document = self.document_ids[:, :, None] == self.document_ids[:, None, :]
        return same_document.tril()[:, None]


def _document_starts(document_ids: np.ndarray) -> np.ndarray:
    ids = document_ids.reshape(-1)
    return np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [ids.size])).astype(np.int32)
