"""Reading a working set by index, with a backward pass that adds straight into one persistent gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamem_kernels.row_gather import gather_rows
from megamem_kernels.segment_sum import segment_sum


class RowLookup(torch.autograd.Function):
    """``rows[index]``, whose backward pass adds to ``rows.grad`` in a fixed order.

    :func:`torch.nn.functional.embedding` allocates a gradient of the whole working set for every micro-batch, and on CUDA
    adds with atomics.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        """``rows`` ``[unique, width]`` fp32, ``index`` int64 of any shape; the result has one axis more."""
        ctx.rows = rows
        ctx.save_for_backward(index)
        out = rows.new_empty(index.numel(), rows.shape[1])
        return gather_rows({"rows": rows.detach()}, index.reshape(-1), out).view(*index.shape, rows.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        """Nothing is handed on: the gradient lies in ``rows.grad``."""
        (index,) = ctx.saved_tensors
        rows, (gradient,) = ctx.rows, gradients
        if rows.grad is None:
            rows.grad = torch.zeros_like(rows)
        segment_sum(
            gradient.reshape(-1, rows.shape[1]).contiguous(),
            index.reshape(-1),
            len(rows),
            out=rows.grad,
            accumulate=True,
        )
        return None, None


@dataclass(frozen=True, slots=True)
class MicroMemory:
    """The memory of one micro-batch; its working sets are those of the whole step."""

    _working_sets: dict[str, Tensor]
    _index: dict[str, Tensor]
    _host_index: dict[str, np.ndarray]

    def rows(self, table: str) -> Tensor:
        """The working set of a table, ``[unique, width]`` fp32 on the engine's device: a leaf whose gradient accumulates
        over the micro-batches of the step."""
        return self._working_sets[table]

    def index(self, stream: str) -> Tensor:
        """``[b, s_local, k]`` int64 on the engine's device; ``rows(table)[index(stream)]`` are the addressed rows."""
        return self._index[stream]

    def host_index(self, stream: str) -> np.ndarray:
        """:meth:`index` as a numpy array, readable without waiting for the device."""
        return self._host_index[stream]

    def lookup(self, table: str, stream: str) -> Tensor:
        """The addressed rows ``[s_local, b, k, width]`` fp32, in megatron's order of axes; their gradient is added to that of the
        working set."""
        return RowLookup.apply(self._working_sets[table], self._index[stream].transpose(0, 1))
