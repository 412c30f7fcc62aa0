"""The slice of a sequence that one tensor-parallel rank works on in memory modules: every token is on one rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class SequenceSlice:
    """Positions ``[rank * s / tp, (rank + 1) * s / tp)`` of every sequence, and how to get there and back.

    Under sequence parallelism the rank's activations are that slice already. Without it they are whole and the same on
    all ranks, and so is their gradient: that of the slice is gathered on the way back.
    """

    def __init__(self, config: TransformerConfig, tp_group: ProcessGroup | None = None) -> None:
        """``tp_group`` defaults to megatron's; ValueError if its size is not that of ``config``."""
        self.group = get_tensor_model_parallel_group_if_none(tp_group)
        self.size = 1 if self.group is None else self.group.size()
        self.rank = 0 if self.group is None else self.group.rank()
        if self.size != config.tensor_model_parallel_size:
            raise ValueError(
                f"tensor_model_parallel_size={config.tensor_model_parallel_size} in a group of {self.size}"
            )
        self._whole = self.size > 1 and not config.sequence_parallel

    def enter(self, hidden_states: Tensor) -> Tensor:
        """The layer's activations ``[s or s / tp, b, h]`` to the slice ``[s / tp, b, h]``; tp divides ``s``."""
        return scatter_to_sequence_parallel_region(hidden_states, group=self.group) if self._whole else hidden_states

    def leave(self, output: Tensor) -> Tensor:
        """The inverse of :meth:`enter`."""
        if not self._whole:
            return output
        return gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False, group=self.group)

    def extend_left(self, x: Tensor, length: int) -> Tensor:
        """A slice ``[s / tp, b, h]`` with the ``length`` positions before it, ``[length + s / tp, b, h]``.

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
        ``[b, left + s / tp]``; -1 before the sequence.
        """
        length = document_ids.shape[1] // self.size
        start = self.rank * length
        return F.pad(document_ids, (left, 0), value=-1)[:, start : start + left + length]

    def mark_partial(self, module: nn.Module) -> None:
        """Declare gradients of all parameters in ``module``, which every rank holds whole, partial over the group."""
        for parameter in module.parameters():
            parameter.grad_partial_over_tp = self.size > 1  # type: ignore[attr-defined]
            parameter.sequence_parallel = False  # type: ignore[attr-defined]  # megatron's mark would sum them once more
