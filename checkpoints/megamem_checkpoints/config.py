"""The ``checkpoint`` section."""

from __future__ import annotations

from dataclasses import dataclass

from megamem.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """``checkpoint``: when to save, how many to keep, where to start from."""

    interval: int = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones are deleted after a newer one is complete."""
    load: str = ""
    """Run directory or checkpoint to take the weights from when this run has no checkpoint of its own."""

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise ConfigError(f"interval is {self.interval}; set 0 or more steps")
        if self.keep < 1:
            raise ConfigError(f"keep is {self.keep}; set it to at least 1")
