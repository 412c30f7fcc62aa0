"""Checkpoints of a run: when they are begun, and who hears how they ended."""

from __future__ import annotations

from dataclasses import asdict

from megamem.train.trainer import Trainer
from megamem_launch.compose import Parts, checkpoint_meta
from megamem_launch.observer import RunObserver
from megamem_launch.rundir import check_lease


class Saver:
    """Saves what ``trainer`` trains, in the background or not as ``checkpoint.asynchronous`` says."""

    def __init__(self, parts: Parts, observer: RunObserver, trainer: Trainer) -> None:
        self._parts, self._observer, self._trainer = parts, observer, trainer
        self._rank = parts.groups.coordinates.rank

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after ``step`` steps, or begin to, when an earlier one has ended. Collective.

        Raises:
            CheckpointError: this one was not written. That the one before it was not is an event.
            LaunchError: another incarnation has taken the run over.
        """
        parts = self._parts
        if self._rank == 0:
            check_lease(parts.config.run_dir)
        try:
            parts.checkpointer.start(
                step,
                entries=parts.entries,
                state_of=parts.zero.full_state,
                tables=parts.memory.tables,
                meta=checkpoint_meta(parts, asdict(self._trainer.progress), self._trainer.guard.state_dict()),
            )
            if not parts.config.checkpoint.asynchronous:
                parts.checkpointer.wait()
        finally:
            self.report()
        # How the first rank reads the tables of its stage; the others read like it, from other documents.
        if self._rank == 0 and (streams := parts.memory.access()):
            self._observer.record("access", step, rank=self._rank, streams=streams)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._parts.checkpointer.busy

    def report(self) -> None:
        """Tell the observer about saves that have ended; never waits."""
        for outcome in self._parts.checkpointer.ended():
            if outcome.error is None:
                text = f"checkpoint of step {outcome.step} in {outcome.path}"
                self._observer.event("checkpoint", outcome.step, text)
            else:
                self._observer.event("checkpoint_failed", outcome.step, str(outcome.error))

    def wait(self) -> None:
        """Return when nothing is being written any more. Collective; CheckpointError where the last one was not written."""
        try:
            self._parts.checkpointer.wait()
        finally:
            self.report()

    def close(self) -> None:
        """As :meth:`wait`, for a run that has failed already: no error is raised."""
        self._parts.checkpointer.close()
        self.report()
