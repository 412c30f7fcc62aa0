"""Per-micro-batch data of the model, carried by the argument that every megatron layer already hands on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megamem.batch import MicroBatch

if TYPE_CHECKING:
    from megamem.memory.lookup import MicroMemory


class Segments(NamedTuple):
    """The documents of a part of every sequence as flash-attn's variable-length kernel takes them."""

    query_starts: Tensor
    """``[documents + 1]`` int32 on the device: where the queries of each document begin among those of the part, and the end."""
    key_starts: Tensor
    """``[documents + 1]`` int32 likewise among their keys, which may begin before the part."""
    longest_query: int
    longest_key: int
    first_keys: list[int]
    """For each sequence, the position of its first key: where the document that the part begins in begins."""


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
    part: int = 0
    """Which of :attr:`parts` of every sequence this rank holds: its place in the context-parallel group."""
    parts: int = 1
    """Contiguous parts of equal length that sequences are cut into: the size of the context-parallel group."""
    _attention_masks: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"
        self.max_seqlen_q = self.max_seqlen_kv = self.document_ids.shape[1]  # the length of megatron's RoPE table

    @classmethod
    def from_batch(
        cls,
        micro: MicroBatch,
        device: torch.device,
        memory: MicroMemory | None = None,
        *,
        part: int = 0,
        parts: int = 1,
    ) -> MicroContext:
        """The context of ``micro`` on ``device``. Boundaries are found on the host: nothing waits for the device."""
        ids = torch.from_numpy(micro.document_ids).to(device, non_blocking=True)
        context = cls(document_ids=ids, memory=memory, part=part, parts=parts)
        context.document_starts = _document_starts(micro.document_ids)
        return context

    @property
    def positions(self) -> slice:
        """The part: positions of every sequence whose tokens this rank's context-parallel place holds."""
        length = self.document_ids.shape[1] // self.parts
        return slice(self.part * length, (self.part + 1) * length)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """``[documents + 1]`` int32 on the host: the first token of each document, in reading order, and the end."""
        return _document_starts(self.document_ids.cpu().numpy())

    @cached_property
    def segments(self) -> Segments:
        """Queries of the part and the keys that they may see, those of their documents up to the end of the part."""
        length, part = self.document_ids.shape[1], self.positions
        starts, stops = self.document_starts[:-1], self.document_starts[1:]
        sequences = starts // length * length
        queries, stops = np.maximum(starts, sequences + part.start), np.minimum(stops, sequences + part.stop)
        here = queries < stops
        starts, stops, queries, sequences = (array[here] for array in (starts, stops, queries, sequences))
        first_of_part = starts <= sequences + part.start
        return Segments(
            self._offsets(stops - queries),
            self._offsets(stops - starts),
            int((stops - queries).max()),
            int((stops - starts).max()),
            (starts - sequences)[first_of_part].tolist(),
        )

    def _offsets(self, lengths: np.ndarray) -> Tensor:
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        return torch.from_numpy(offsets).to(self.document_ids.device, non_blocking=True)

    @property
    def is_causal(self) -> bool:
        """Whether every sequence is one document, so that causality alone says what attention may see."""
        return len(self.document_starts) == len(self.document_ids) + 1

    def attention_mask(self, dtype: torch.dtype) -> Tensor | None:
        """``[b, 1, queries, keys]`` of ``dtype``, to be added to scores: 0 where a query of the part may see a key, of which there
        are those up to the end of the part, and minus infinity elsewhere. None where :attr:`is_causal` and the part is the whole.

        The same tensor in every call: SDPA would turn a mask of bools into one of these per layer, and keep each for backward.
        """
        if self.is_causal and self.parts == 1:
            return None
        if dtype not in self._attention_masks:
            part = self.positions
            queries, keys = self.document_ids[:, part, None], self.document_ids[:, None, : part.stop]
            hidden = (queries == keys).tril(part.start).logical_not()[:, None]
            self._attention_masks[dtype] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )
        return self._attention_masks[dtype]


def _document_starts(document_ids: np.ndarray) -> np.ndarray:
    ids = document_ids.reshape(-1)
    return np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [ids.size])).astype(np.int32)
