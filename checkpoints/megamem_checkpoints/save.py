"""Writing a checkpoint: all ranks into a temporary directory, one manifest, one rename."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megamem
from megamem.errors import CheckpointError, MegamemError
from megamem.files import write_text
from megamem_checkpoints import dense, directory, rng, tables
from megamem_checkpoints.config import CheckpointConfig
from megamem_checkpoints.files import check_size, in_parallel, record, writer_lock
from megamem_checkpoints.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    DenseRecord,
    FileRecord,
    Manifest,
    TableRecord,
    plain_json,
)
from megamem_checkpoints.owned import Base, TableSave
from megamem_checkpoints.ranks import Ranks

if TYPE_CHECKING:
    import numpy as np

    from megamem.memory.table import OwnedTable
    from megamem.models.canonical import CanonicalEntry
    from megamem.parallel.groups import Groups

Part = tuple[dict[str, FileRecord], dict[str, DenseRecord], dict[str, TableRecord]]
"""What one rank contributed: its files, its dense tensors, its ranges of tables."""

_log = logging.getLogger(__name__)


class Saving:
    """One checkpoint on its way. What training waits for is :meth:`begin`; :meth:`finish` may run on another thread while the
    state that was saved changes."""

    def __init__(
        self, root: Path, step: int, config: CheckpointConfig, lead: bool, before_publish: Callable[[], None]
    ) -> None:
        self.step = step
        self.final = root / directory.name_of(step)
        self._root, self._config, self._lead, self._before_publish = root, config, lead, before_publish
        self._temporary = self.final.with_name(self.final.name + ".tmp")
        self._resources = contextlib.ExitStack()
        self._meta: dict[str, Any] = {}
        self._rng: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        self._dense_records: dict[str, DenseRecord] = {}
        self._tables: dict[str, TableSave] = {}
        self._device = torch.device("cpu")
        self._chain = 0

    def begin(
        self,
        *,
        groups: Groups | None,
        entries: Sequence[CanonicalEntry],
        state_of: Callable[[nn.Parameter], dict[str, Tensor]],
        owned: Mapping[str, OwnedTable],
        meta: Mapping[str, Any],
        rng_states: Mapping[str, Tensor],
        base: Base | None,
    ) -> None:
        """Take hold of the present state; see :meth:`megamem_checkpoints.checkpointer.Checkpointer.save`."""
        ranks = Ranks(groups.world if groups is not None else None)
        self._device = groups.device if groups is not None else self._device
        self._chain = base.chain + 1 if base is not None else 0
        with self._whole_or_nothing():
            ranks.together(partial(self._prepare, meta))
            self._dense, self._dense_records = ranks.together(
                lambda: dense.collect(entries, state_of, dense.Sharding(groups))
            )
            ranks.together(partial(self._hold, owned, rng_states, base))

    def finish(self, group: dist.ProcessGroup | None) -> Base:
        """Write the checkpoint and give it its name; returns what the next one may add to. Collective over ``group``."""
        ranks = Ranks(group)
        with self._whole_or_nothing():
            self._use_device()
            files = ranks.together(partial(self._write_local, ranks.rank))
            ranks.together(lambda: dense.write(self._temporary, self._dense, group))
            self._dense.clear()
            files |= ranks.together(partial(self._dense_files, ranks.rank))
            mine = {name: table.record for name, table in self._tables.items()}
            parts: list[Part] = ranks.gather_to_first((files, self._dense_records, mine))
            label = ranks.gather(ranks.together(partial(self._publish, parts)))[0]
        try:
            self._commit_tables(label)
        finally:
            self._release()
        linkable = {name: files[name] for table in mine.values() for name in table.names()}
        return Base(self.final, mine, linkable, self._chain)

    def _prepare(self, meta: Mapping[str, Any]) -> None:
        if self._lead:
            self._meta = plain_json(meta)
            self._root.mkdir(parents=True, exist_ok=True)
            self._resources.enter_context(writer_lock(self._root))
            self._resources.callback(shutil.rmtree, self._temporary, ignore_errors=True)
            directory.prepare(self._root, self._temporary)

    def _hold(self, owned: Mapping[str, OwnedTable], rng_states: Mapping[str, Tensor], base: Base | None) -> None:
        self._rng = rng.collect(rng_states)
        for name, table in owned.items():
            self._tables[name] = TableSave(self._temporary, table, self.step, base, self._config.incremental)

    def _write_local(self, rank: int) -> dict[str, FileRecord]:
        name = rng.file_name(rank)
        files = {name: rng.write(self._temporary / name, self._rng)}
        work = [(table, *piece) for table in self._tables.values() for piece in table.plan()]
        in_parallel(self._config.io_threads, self._write_piece, work)
        for table in self._tables.values():
            files |= table.files
        return files

    def _write_piece(self, item: tuple[TableSave, str, range | np.ndarray]) -> None:
        self._use_device()
        table, name, positions = item
        table.write(name, positions)

    def _use_device(self) -> None:
        """Make the run's device the current one of this thread, for kernels: to begin with it is the first of the machine."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _dense_files(self, rank: int) -> dict[str, FileRecord]:
        paths = dense.files_of(self._temporary, rank)
        records = in_parallel(self._config.io_threads, record, paths)
        return {path.relative_to(self._temporary).as_posix(): item for path, item in zip(paths, records, strict=True)}

    def _publish(self, parts: Sequence[Part]) -> str:
        if not self._lead:
            return ""
        manifest = _manifest(self._temporary, self.step, self._meta, parts, self._chain)
        write_text(self._temporary / FILE_NAME, manifest.dumps())
        self._before_publish()
        directory.publish(self._temporary, self.final)
        try:
            directory.prune(self._root, keep=self._config.keep, keep_every=self._config.keep_every, step=self.step)
        except OSError as error:
            _log.warning("an old checkpoint could not be deleted: %s", error)
        return manifest.label(self.final)

    def _commit_tables(self, label: str) -> None:
        """The checkpoint is complete: that disk files can stand in for it only saves a resume from reading it."""
        for name, table in self._tables.items():
            try:
                table.close(label)
            except (MegamemError, OSError) as error:
                _log.warning("a resume will read table %s from %s, not from its tier: %s", name, self.final, error)

    def _release(self) -> None:
        """Let go of tables, lock and temporary directory. Idempotent."""
        for table in self._tables.values():
            table.close()
        self._resources.close()

    @contextlib.contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._release()
            if isinstance(error, CheckpointError):
                raise CheckpointError(
                    f"the checkpoint of step {self.step} was not written to {self._root}: {error}; the one before it is "
                    "untouched: make room there and give the same command again"
                ) from error
            raise


def _manifest(temporary: Path, step: int, meta: Mapping[str, Any], parts: Sequence[Part], chain: int) -> Manifest:
    files = {name: item for part in parts for name, item in part[0].items()}
    try:
        for name, item in files.items():
            check_size(temporary, name, item)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} as rank 0 sees it; set runs_dir to a file system that all ranks share"
        ) from None
    dense_records: dict[str, DenseRecord] = {}
    for part in parts:
        for name, dense_record in part[1].items():
            if dense_records.setdefault(name, dense_record) != dense_record:
                raise ValueError(f"ranks disagree about tensor {name}: {dense_records[name]} and {dense_record}")
    names = {name for part in parts for name in part[2]}
    return Manifest(
        format_version=FORMAT_VERSION,
        megamem_version=megamem.__version__,
        step=step,
        world_size=len(parts),
        meta=dict(meta),
        files=files,
        dense=dense_records,
        tables={name: tables.merge([part[2][name] for part in parts if name in part[2]]) for name in sorted(names)},
        chain=chain,
    )
