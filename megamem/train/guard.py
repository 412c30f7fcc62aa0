"""The guard against steps that would do harm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megamem.errors import MegamemError
from megamem.train.config import TrainConfig

_MEMORY = 0.9  # weight of the past in the running mean of the loss
_WARM = 20  # steps before the running mean means something


@dataclass(slots=True)
class LossGuard:
    """Decides whether a step is applied. Fed with values that are equal on all ranks, so that all decide alike."""

    config: TrainConfig
    mean: float = 0.0
    seen: int = 0
    skipped_in_row: int = 0

    def refuses(self, loss: float, grad_norm: float) -> str | None:
        """The reason to skip this step, or None to apply it. Too many skips in a row raise MegamemError."""
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self.mean = loss if not self.seen else _MEMORY * self.mean + (1 - _MEMORY) * loss
            self.seen += 1
            self.skipped_in_row = 0
            return None
        self.skipped_in_row += 1
        if self.skipped_in_row > self.config.max_skipped_steps:
            raise MegamemError(
                f"{self.skipped_in_row} steps in a row were skipped, the last because {reason}; lower optimizer.lr, or raise "
                "train.max_skipped_steps, and start again from the last checkpoint"
            )
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        factor = self.config.skip_loss_above
        if factor and self.seen >= _WARM and loss > factor * self.mean:
            return f"the loss {loss:.3f} is more than {factor:g} times its running mean {self.mean:.3f}"
        return None

    def state_dict(self) -> dict[str, float]:
        """Plain numbers that continue the guard after a resume."""
        return {"mean": self.mean, "seen": self.seen, "skipped_in_row": self.skipped_in_row}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`."""
        self.mean = float(state["mean"])
        self.seen = int(state["seen"])
        self.skipped_in_row = int(state["skipped_in_row"])
