"""Rotary position embedding under context parallelism."""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class PartRotaryEmbedding(nn.Module):
    """megatron-core's embedding for a rank that holds a contiguous part of every sequence.

    megatron itself would cut the angles for its own division, in which each rank holds one chunk from either end.
    """

    def __init__(self, whole: RotaryEmbedding, cp_group: ProcessGroup) -> None:
        super().__init__()
        self.whole = whole
        self.cp_group = cp_group

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Positions of a whole sequence, as :meth:`RotaryEmbedding.get_rotary_seq_len` tells them."""
        return self.whole.get_rotary_seq_len(*args, **kwargs)

    def forward(self, max_seq_len: int, **unused: Any) -> Tensor:
        """Angles ``[max_seq_len / cp, 1, 1, d]`` of the positions of this rank's part."""
        length = max_seq_len // self.cp_group.size()
        angles: Tensor = self.whole(max_seq_len, packed_seq=True)  # which keeps megatron from cutting them
        return angles.narrow(0, self.cp_group.rank() * length, length)
