"""What a message between two ranks is made of: bytes, laid out the same way by the rank that sends and the one that receives.

A message has one section per stream. A section holds one block per field, ``[rows, *shape]``, and a word that tells which
message it belongs to, mixed with the checksum of its blocks where that is asked for. Everything starts at a multiple of eight
bytes, so that blocks can be read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamem.memory.exchange.ids import checksum
from megamem_kernels.formats import Field

_WORD = 8


@dataclass(frozen=True, slots=True)
class Section:
    """What a message says of every row of one stream."""

    name: str
    """In the words of an error message."""
    fields: tuple[Field, ...]

    def nbytes(self, rows: int) -> int:
        """Bytes of all blocks."""
        return sum(_padded(rows * field.nbytes) for field in self.fields)


@dataclass(frozen=True, slots=True)
class Form:
    """The layout of one kind of message."""

    sections: tuple[Section, ...]
    checked: bool
    """Whether sections carry checksums."""

    def nbytes(self, rows: Sequence[int]) -> int:
        """Bytes of a message with ``rows[i]`` rows in section ``i``."""
        return sum(section.nbytes(count) + _WORD for section, count in zip(self.sections, rows, strict=True))

    def blocks(self, message: Tensor, rows: Sequence[int]) -> list[list[Tensor]]:
        """Views of uint8 ``message``: by section and field ``[rows, *shape]`` of the field's dtype."""
        start, sections = 0, []
        for section, count in zip(self.sections, rows, strict=True):
            blocks = []
            for field in section.fields:
                flat = message[start : start + count * field.nbytes].view(field.dtype)
                blocks.append(flat.view(count, *field.shape))
                start += _padded(count * field.nbytes)
            sections.append(blocks)
            start += _WORD
        return sections

    def seal(self, message: Tensor, rows: Sequence[int], tag: int) -> None:
        """Write the last word of every section of a message that is called ``tag``, which is below ``2**63``."""
        if message.device.type == "cpu":
            for words, _ in self._words(message, rows):
                words[-1] = self._end(words, tag)
        elif self.checked:
            sealed = message.cpu()
            self.seal(sealed, rows, tag)
            message.copy_(sealed)

    def damaged(self, message: Tensor, rows: Sequence[int], tag: int) -> str | None:
        """Name of the first section that does not end as :meth:`seal` would end it; None where all do.

        Without checksums this costs nothing and still finds messages of another call or length: gloo accepts one that is
        shorter than was announced and leaves the rest of the buffer as it was. Only on the CPU: no other backend does.
        """
        if message.device.type != "cpu" and not self.checked:
            return None
        return next(
            (name for words, name in self._words(message.cpu(), rows) if words[-1] != self._end(words, tag)), None
        )

    def _end(self, words: np.ndarray, tag: int) -> np.uint64:
        return np.uint64(tag) ^ (checksum(words[:-1]) if self.checked else np.uint64(0))

    def _words(self, message: Tensor, rows: Sequence[int]) -> list[tuple[np.ndarray, str]]:
        """By section its words as uint64, and its name."""
        words, start, sections = message.numpy().view(np.uint64), 0, []
        for section, count in zip(self.sections, rows, strict=True):
            stop = start + section.nbytes(count) // _WORD + 1
            sections.append((words[start:stop], section.name))
            start = stop
        return sections


def id_field(limit: int) -> Field:
    """How ids in ``[0, limit)`` travel: in 32 bits where they fit, else in 64."""
    return Field("ids", torch.int32 if limit <= 2**31 else torch.int64, ())


def _padded(nbytes: int) -> int:
    return -(-nbytes // _WORD) * _WORD
