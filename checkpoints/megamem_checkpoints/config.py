"""The ``checkpoint`` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamem.config import at_least
from megamem.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """``checkpoint``: when to save, how many to keep, where to start from."""

    interval: int = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones are deleted after a newer one is complete."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are never deleted, and hold whole tables, so that they share no file with any
    checkpoint before them; 0 for no such step."""
    asynchronous: bool = True
    """Train on while a checkpoint is written: the loop waits for a copy of the dense state in host memory, for a look at the length
    of every table file that is linked, and, in the first save after a kill, until what that one left is deleted. Off: it
    waits for the disk."""
    incremental: Literal["auto", "on", "off"] = "auto"
    """Whether tables are saved as the rows that changed since the last save, beside hard links to the files of that one.
    auto: where fewer than 30 % did. on: always. Either way all of a table is saved where its increments would come to more than
    that, and where there is no earlier save of the same rows. Takes one byte of host memory per row, and while a checkpoint
    is written another one and 8 for each row that changed. Any save takes 1 to 8 (4 between 32768 and 2**31 rows of a rank) bytes
    per row while it is written."""
    full_every: int = 8
    """With increments: one save in so many writes all tables as a whole. At most so many checkpoints in a row share a file, and
    are lost together when it is damaged."""
    io_threads: int = 2
    """Files of a rank that are read, checked, or, of tables, written at once; dense files are written by one thread: DCP loses
    errors of its extra writer threads. Each holds up to 64 MiB in memory."""
    load: str = ""
    """Run directory or checkpoint to take the weights from when this run has no checkpoint of its own."""
    new_memories: bool = False
    """With ``load``: Engram layers and banks that the checkpoint lacks start from their initial values."""

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise ConfigError(f"interval is {self.interval}; set 0 or more steps")
        if self.keep < 1:
            raise ConfigError(f"keep is {self.keep}; set it to at least 1")
        at_least(self, 0, "keep_every")
        at_least(self, 1, "io_threads")
        if self.full_every < 2:
            raise ConfigError(
                f"full_every is {self.full_every}; set 2 or more, or incremental to off to save whole tables every time"
            )
        if self.new_memories and not self.load:
            raise ConfigError(
                "new_memories says what the checkpoint of load may lack; set load, or new_memories to false"
            )
