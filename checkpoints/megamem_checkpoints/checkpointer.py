"""The checkpoints of one run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from megamem.errors import CheckpointError
from megamem_checkpoints import directory
from megamem_checkpoints.config import CheckpointConfig
from megamem_checkpoints.load import load
from megamem_checkpoints.owned import Base
from megamem_checkpoints.ranks import Ranks
from megamem_checkpoints.save import Saving

if TYPE_CHECKING:
    from megamem.memory.table import OwnedTable
    from megamem.models.canonical import CanonicalEntry
    from megamem.parallel.groups import Groups


_TIMEOUT = timedelta(minutes=30)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended."""

    step: int
    path: Path
    error: CheckpointError | None
    """None: the checkpoint is complete and durable."""


class Checkpointer:
    """Saves and loads below ``directory`` (``runs/<name>/checkpoints``), which all ranks must see. To be made by all ranks of
    ``groups`` in the same order, since it makes a group for the collectives of its background thread; by one thread used.

    ``groups`` None means a single process, whether or not torch.distributed is initialised. ``before_publish`` is called on the
    first rank when all is written, on the thread that saves; an error that it raises is that of the save, which leaves nothing.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        groups: Groups | None,
        before_publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.groups = groups
        self._before_publish = before_publish
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if groups is not None else None
        self._running: tuple[Saving, Future[Base]] | None = None
        self._base: Base | None = None
        self._ended: list[Outcome] = []
        self._failure: CheckpointError | None = None

    def save(
        self,
        step: int,
        *,
        entries: Sequence[CanonicalEntry],
        state_of: Callable[[nn.Parameter], dict[str, Tensor]],
        tables: Mapping[str, OwnedTable],
        meta: Mapping[str, Any],
        rng: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the state after ``step`` optimizer steps, whole or not at all, and delete what ``config.keep`` lets go.

        Collective over the world. ``state_of`` maps a parameter to ``{"master", "exp_avg", "exp_avg_sq"}`` of its local
        shape; it is called once per parameter, in the order of ``entries``; a buffer is its own state. ``tables`` are the
        rows that this rank owns. ``meta`` is plain JSON, and rank 0's is kept. ``rng`` are random states (uint8) beside
        torch's own CPU and CUDA states, which are always saved. Returns the checkpoint's directory.

        CheckpointError on every rank where any rank fails (disk full, ...); earlier checkpoints are then untouched. A save
        that was still running is waited for, and its error told by :meth:`ended` alone: this save is attempted all the same.
        """
        path = self.start(step, entries=entries, state_of=state_of, tables=tables, meta=meta, rng=rng)
        self.wait()
        return path

    def start(
        self,
        step: int,
        *,
        entries: Sequence[CanonicalEntry],
        state_of: Callable[[nn.Parameter], dict[str, Tensor]],
        tables: Mapping[str, OwnedTable],
        meta: Mapping[str, Any],
        rng: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Begin what :meth:`save` does; the rest is done on a thread of its own.

        When this returns, training may go on and change everything that was handed in: dense state has been copied to host
        memory, and tables keep what they held (:class:`~megamem.memory.snapshot.Snapshot`). A save that is running is waited
        for. Errors as in :meth:`save`; those of the background come from :meth:`wait`. After a save that failed, this one
        is made from whole tables, and not in the background: it is complete when this returns, or an error on all ranks.
        """
        self._settle()
        earlier, self._failure = self._failure, None
        # Nothing adds to the checkpoint before a failed one: which rows changed since is no longer known.
        base, self._base = self._base, None
        if base is not None and not self._may_share(step, base):
            base = None
        groups, lead = self.groups, self.groups is None or self.groups.coordinates.rank == 0
        if earlier is not None and lead:
            _log.warning("%s; trying again with that of step %d", earlier, step)
        saving = Saving(self.directory, step, self.config, lead, self._before_publish)
        try:
            saving.begin(
                groups=groups,
                entries=entries,
                state_of=state_of,
                owned=tables,
                meta=meta,
                rng_states=rng or {},
                base=base,
            )
        except CheckpointError as error:
            self._ended.append(Outcome(step, saving.final, error))
            raise
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamem-save")
        self._running = saving, thread.submit(saving.finish, self._group)
        thread.shutdown(wait=False)
        if earlier is not None:
            self.wait()
        return saving.final

    def wait(self) -> None:
        """Return when the save that is running has ended; CheckpointError on every rank where it failed on any."""
        self._settle()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def ended(self) -> list[Outcome]:
        """The saves that have ended since the last call. Never waits: ranks may learn of one in different steps."""
        if self._running is not None and self._running[1].done():
            self._settle()
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Let the save that is running end, and log an error that nobody was told."""
        try:
            self.wait()
        except CheckpointError as error:
            _log.error("%s", error)

    @property
    def busy(self) -> bool:
        """Whether a save is still running; never waits."""
        return self._running is not None and not self._running[1].done()

    def _may_share(self, step: int, base: Base) -> bool:
        """Whether the checkpoint of ``step`` may share files with ``base``."""
        config = self.config
        return base.chain + 1 < config.full_every and not (config.keep_every and step % config.keep_every == 0)

    def _settle(self) -> None:
        if self._running is None:
            return
        saving, future = self._running
        try:
            self._base = future.result()
        except Exception as error:
            text = f"the checkpoint of step {saving.step} was not written: {type(error).__name__}: {error}"
            self._failure = error if isinstance(error, CheckpointError) else CheckpointError(text)
        self._running = None
        self._ended.append(Outcome(saving.step, saving.final, self._failure))

    @property
    def _world(self) -> dist.ProcessGroup | None:
        return self.groups.world if self.groups is not None else None

    def latest(self) -> Path | None:
        """The checkpoint to resume from, or None for a fresh run: the one that the file ``latest`` names, else the
        newest whole one. CheckpointError where there are checkpoints but none is whole, or the latest is of a newer
        format.
        """
        return directory.latest(self.directory)

    def agree(self, path: Path | None) -> None:
        """CheckpointError on every rank where ranks would start from different checkpoints (None: from nothing), which
        would leave some waiting for the others. Collective over the world.
        """
        names = {str(path) if path is not None else "none" for path in Ranks(self._world).gather(path)}
        if len(names) > 1:
            raise CheckpointError(
                f"ranks see different checkpoints to start from ({', '.join(sorted(names))}); set runs_dir and "
                "checkpoint.load to a file system that all ranks share"
            )

    def load(
        self,
        path: Path,
        *,
        entries: Sequence[CanonicalEntry],
        put_state: Callable[[nn.Parameter, dict[str, Tensor]], None],
        tables: Mapping[str, OwnedTable],
        optimizer_state: bool = True,
        verify: bool = True,
    ) -> dict[str, Any]:
        """Read ``path``, written under any layout, into this run. Collective over the world.

        ``put_state`` gets each parameter with the states that :meth:`save` took from ``state_of`` (fp32, local shape, on
        the parameter's device), in the order of ``entries``; only ``master`` without ``optimizer_state``. Buffers, owned
        rows of ``tables`` and their state are filled in place. torch's random states are set if the world has the size it
        had; they and the state of tables are left alone without ``optimizer_state``. Returns ``{"step", "meta", "rng", "kept"}``,
        where ``rng`` has the caller's own states (empty under another world size).

        Format, names, shapes and, with ``verify``, the sha256 of every file (each read by one rank) are checked before
        anything is changed; CheckpointError on every rank where one of them is wrong. With ``config.new_memories`` and
        without ``optimizer_state``, memory tensors and tables that the checkpoint lacks stay as they are; ``"kept"`` of the
        result names them, and is empty otherwise.
        """
        loaded, base = load(
            path,
            groups=self.groups,
            entries=entries,
            put_state=put_state,
            owned=tables,
            optimizer_state=optimizer_state,
            verify=verify,
            new_memories=self.config.new_memories and not optimizer_state,
            threads=self.config.io_threads,
        )
        if optimizer_state and self.config.incremental != "off":
            self._base = base
            for table in tables.values():
                table.track_changes()
        return loaded
