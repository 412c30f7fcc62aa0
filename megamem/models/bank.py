"""Hierarchical bank: feed-forward blocks, fetched by document, that widen a layer (arXiv 2510.02375, appendix I)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megamem.memory.config import BankConfig
from megamem.memory.names import bank_stream_name, bank_table_name
from megamem.models.micro import MicroContext
from megamem.models.sequence import SequenceSlice


class Bank(MegatronModule):
    """The sum over the tree's levels of ``(silu(x M1^T) * (x M2^T)) M3``, with the blocks of each token's document.

    A row of level ``l`` holds ``[M1 | M2 | M3]``, each ``[units[l], hidden_size]``. The module has no parameters.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        bank: BankConfig,
        layer: int,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """``layer`` is zero-based over the whole model; ``pg_collection`` defaults to megatron's groups."""
        super().__init__(config)
        levels = [level for level, units in enumerate(bank.units, start=1) if units]
        self._streams = [bank_stream_name(level) for level in levels]
        self._tables = [bank_table_name(layer, level) for level in levels]
        self._slice = SequenceSlice(config, pg_collection)

    def forward(self, x: Tensor, context: MicroContext) -> Tensor:
        """What the blocks add to the feed-forward output for its input ``x``, in the shape and dtype of ``x``.

        ``x`` is ``[s / cp, b, h]``, or ``[s / (cp * tp), b, h]`` under sequence parallelism; ``context.memory`` must be there.
        """
        memory = context.memory
        assert memory is not None
        x = self._slice.enter(x).transpose(0, 1)
        index = np.stack([memory.host_index(stream)[..., 0] for stream in self._streams])
        paths, lengths = _runs(index.reshape(len(self._streams), -1))
        levels = [memory.rows(table).unbind() for table in self._tables]
        blocks = {
            path: _widen([level[row] for level, row in zip(levels, path, strict=True)], x)
            for path in dict.fromkeys(paths)
        }
        tokens = x.flatten(0, 1).split(lengths)
        output = torch.cat([_swiglu(run, blocks[path]) for run, path in zip(tokens, paths, strict=True)])
        return self._slice.leave(output.view_as(x).transpose(0, 1))


def _runs(index: np.ndarray) -> tuple[list[tuple[int, ...]], list[int]]:
    """Runs of tokens that read the same blocks, for ``[levels, tokens]`` block indices: these indices and the lengths.

    The tokens of a document are neighbours, so no run is shorter than the part of the document that is here.
    """
    starts = np.concatenate(([0], np.flatnonzero((index[:, 1:] != index[:, :-1]).any(0)) + 1))
    return [tuple(path) for path in index[:, starts].T.tolist()], np.diff(starts, append=index.shape[1]).tolist()


def _widen(rows: list[Tensor], x: Tensor) -> Tensor:
    """Blocks of several levels side by side as one: ``[3, units of all levels, h]`` in the dtype of ``x``."""
    return torch.cat([row.to(x.dtype).view(3, -1, x.shape[-1]) for row in rows], dim=1)


def _swiglu(x: Tensor, block: Tensor) -> Tensor:
    """``x`` ``[tokens, h]`` through a block ``[3, units, h]``; M1 and M2 lie side by side and take one product."""
    gate, up = (x @ block[:2].flatten(0, 1).t()).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ block[2]
