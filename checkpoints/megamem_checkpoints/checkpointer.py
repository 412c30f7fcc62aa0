"""The checkpoints of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from megamem.errors import CheckpointError
from megamem_checkpoints import directory
from megamem_checkpoints.config import CheckpointConfig
from megamem_checkpoints.load import load
from megamem_checkpoints.ranks import Ranks
from megamem_checkpoints.save import save

if TYPE_CHECKING:
    from megamem.memory.table import OwnedTable
    from megamem.models.canonical import CanonicalEntry
    from megamem.parallel.groups import Groups


class Checkpointer:
    """Saves and loads below ``directory`` (``runs/<name>/checkpoints``), which all ranks must see.

    ``groups`` None means a single process, whether or not torch.distributed is initialised.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, groups: Groups | None) -> None:
        self.directory = directory
        self.config = config
        self.groups = groups

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

        CheckpointError on every rank where any rank fails (disk full, ...); earlier checkpoints are then untouched.
        """
        return save(
            self.directory,
            step,
            keep=self.config.keep,
            groups=self.groups,
            entries=entries,
            state_of=state_of,
            owned=tables,
            meta=meta,
            rng_states=rng or {},
        )

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
        names = {str(path) if path is not None else "none" for path in Ranks(self.groups).gather(path)}
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
        had; they and the state of tables are left alone without ``optimizer_state``. Returns ``{"step", "meta", "rng"}``,
        where ``rng`` has the caller's own states (empty under another world size).

        Format, names, shapes and, with ``verify``, the sha256 of every file (each read by one rank) are checked before
        anything is changed; CheckpointError on every rank where one of them is wrong.
        """
        return load(
            path,
            groups=self.groups,
            entries=entries,
            put_state=put_state,
            owned=tables,
            optimizer_state=optimizer_state,
            verify=verify,
        )
