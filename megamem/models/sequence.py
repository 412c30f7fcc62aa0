"""The slice of a sequence that one rank works on in memory modules: every token is on one rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn


class SequenceSlice:
    """Positions ``[rank * s / size, (rank + 1) * s / size)`` of every sequence, and how to get there and back.

    There are ``size = cp * tp`` slices, for context parallelism cuts a sequence into ``cp`` parts and tensor parallelism each
    part into ``tp`` slices. Under sequence parallelism the rank's activations are its slice already. Without it they are
    its part, the same on all tensor-parallel ranks, and so is their gradient: that of the slice is gathered on the way back.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        """``pg_collection`` defaults to megatron's groups; ValueError if tensor parallelism is not that of ``config``."""
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "tp_cp"])
        self.tp_group, self.group = pg_collection.tp, pg_collection.tp_cp
        self.tp_size, self.size, self.rank = (
            get_pg_size(self.tp_group),
            get_pg_size(self.group),
            get_pg_rank(self.group),
        )
        if self.tp_size != config.tensor_model_parallel_size:
            raise ValueError(
                f"tensor_model_parallel_size={config.tensor_model_parallel_size} in a group of {self.tp_size}"
            )
        self._whole = self.tp_size > 1 and not config.sequence_parallel

    def enter(self, hidden_states: Tensor) -> Tensor:
        """The layer's activations, ``[s / cp or s / size, b, h]``, to the slice ``[s / size, b, h]``; size divides ``s``."""
        return scatter_to_sequence_parallel_region(hidden_states, group=self.tp_group) if self._whole else hidden_states

    def leave(self, output: Tensor) -> Tensor:
        """The inverse of :meth:`enter`."""
        if not self._whole:
            return output
        return gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False, group=self.tp_group)

    def extend_left(self, x: Tensor, length: int) -> Tensor:
        """A slice ``[s / size, b, h]`` with the ``length`` positions before it, ``[length + s / size, b, h]``.

        Positions before the sequence are zero. The left neighbours' positions come from one all-gather of every rank's
        last positions, at most ``length`` each, and their gradients go back to the ranks that own them.
        """
        if length == 0:
            return x
        if self.size == 1:
            return F.pad(x, (0, 0, 0, 0, length, 0))
        tail = min(length, x.shape[0])
        tails = gather_from_sequence_parallel_region(x[-tail:], tensor_parallel_output_grad=True, group=self.group)
        end = self.rank * tail  # where tails are shorter than `length` they are whole slices, so they join without gaps
        left = tails[max(0, end - length) : end]
        return torch.cat((F.pad(left, (0, 0, 0, 0, length - left.shape[0], 0)), x))

    def documents(self, document_ids: Tensor, left: int) -> Tensor:
        """Document ids ``[b, s]`` of whole sequences to those of the slice and ``left`` positions before it,
        ``[b, left + s / size]``; -1 before the sequence.
        """
        length = document_ids.shape[1] // self.size
        start = self.rank * length
        return F.pad(document_ids, (left, 0), value=-1)[:, start : start + left + length]

    def mark_partial(self, module: nn.Module) -> None:
        """Declare gradients of all parameters in ``module``, which every rank holds whole, partial over tensor parallelism.

        Those over context parallelism are summed with those of data parallelism, as all dense gradients are.
        """
        for parameter in module.parameters():
            parameter.grad_partial_over_tp = self.tp_size > 1  # type: ignore[attr-defined]
            parameter.sequence_parallel = False  # type: ignore[attr-defined]  # megatron's mark would sum them once more
