"""Hierarchical bank: feed-forward blocks, fetched by document, that widen a layer (arXiv 2510.02375, appendix I)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megamem.memory.config import BankConfig
from megamem.memory.streams import bank_stream_name, bank_table_name
from megamem.models.micro import MicroContext
from megamem.models.sequence import SequenceSlice


class Bank(MegatronModule):
    """The sum over the tree's levels of ``(silu(x M1^T) * (x M2^T)) M3``, with the blocks of each token's document.

    A row of level ``l`` holds ``[M1 | M2 | M3]``, each ``[units[l], hidden_size]``. The module has no parameters.
    """

    def __init__(
        self, config: TransformerConfig, *, bank: BankConfig, layer: int, tp_group: ProcessGroup | None = None
    ) -> None:
        """``layer`` is zero-based over the whole model; ``tp_group`` defaults to megatron's."""
        super().__init__(config)
        levels = [level for level, units in enumerate(bank.units, start=1) if units]
        self._streams = [bank_stream_name(level) for level in levels]
        self._tables = [bank_table_name(layer, level) for level in levels]
        self._slice = SequenceSlice(config, tp_group)

    def forward(self, x: Tensor, context: MicroContext) -> Tensor:
        """What the blocks add to the feed-forward output for its input ``x``, in the shape and dtype of ``x``.

        ``x`` is ``[s, b, h]``, or ``[s / tp, b, h]`` under sequence parallelism; ``context.memory`` must be there.
        """
        x = self._slice.enter(x).transpose(0, 1)
        index = np.stack([context.memory.host_index(stream)[..., 0] for stream in self._streams])
        paths, lengths = _runs(index.reshape(len(self._streams), -1))
        levels = [context.memory.rows(table).unbind() for table in self._tables]
        outputs = [
            sum(_swiglu(tokens, level[block]) for level, block in zip(levels, path, strict=True))
            for tokens, path in zip(x.flatten(0, 1).split(lengths), paths, strict=True)
        ]
        return self._slice.leave(torch.cat(outputs).view_as(x).transpose(0, 1))


def _runs(index: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """``[levels, tokens]`` block ids to those of each run of tokens that read the same blocks, and the runs' lengths.

    The tokens of a document are neighbours, so no run is shorter than the part of the document that is here.
    """
    starts = np.flatnonzero((index[:, 1:] != index[:, :-1]).any(0)) + 1
    starts = np.concatenate(([0], starts))
    return index[:, starts].T.tolist(), np.diff(starts, append=index.shape[1]).tolist()


def _swiglu(x: Tensor, block: Tensor) -> Tensor:
    """``x`` ``[tokens, h]`` through one block ``[3 * units * h]``; M1 and M2 lie side by side and take one product."""
    matrices = block.to(x.dtype).view(-1, x.shape[-1])
    inputs, output = matrices.tensor_split([matrices.shape[0] // 3 * 2])
    gate, up = (x @ inputs.t()).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ output
