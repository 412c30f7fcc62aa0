"""Writing a checkpoint: all ranks into a temporary directory, one manifest, one rename."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import megamem
from megamem.errors import CheckpointError
from megamem.files import write_text
from megamem_checkpoints import dense, directory, rng, tables
from megamem_checkpoints.files import check_size, record, writer_lock
from megamem_checkpoints.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    DenseRecord,
    FileRecord,
    Manifest,
    TableRecord,
    plain_json,
)
from megamem_checkpoints.ranks import Ranks

if TYPE_CHECKING:
    from megamem.memory.table import OwnedTable
    from megamem.models.canonical import CanonicalEntry
    from megamem.parallel.groups import Groups

Part = tuple[dict[str, FileRecord], dict[str, DenseRecord], dict[str, TableRecord]]
"""What one rank contributed: its files, its dense tensors, its ranges of tables."""

_log = logging.getLogger(__name__)


def save(
    root: Path,
    step: int,
    *,
    keep: int,
    groups: Groups | None,
    entries: Sequence[CanonicalEntry],
    state_of: Callable[[nn.Parameter], dict[str, Tensor]],
    owned: Mapping[str, OwnedTable],
    meta: Mapping[str, Any],
    rng_states: Mapping[str, Tensor],
) -> Path:
    """See :meth:`megamem_checkpoints.checkpointer.Checkpointer.save`."""
    ranks = Ranks(groups)
    lead = ranks.rank == 0
    final = root / directory.name_of(step)
    temporary = final.with_name(final.name + ".tmp")
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            if lead:
                plain_json(meta)
                root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(writer_lock(root))
                stack.callback(shutil.rmtree, temporary, ignore_errors=True)
                directory.prepare(root, temporary)

        def commit() -> str:
            if not lead:
                return ""
            manifest = _manifest(temporary, step, ranks.size, meta, parts)
            write_text(temporary / FILE_NAME, manifest.dumps())
            directory.publish(temporary, final)
            _prune(root, keep, step)
            return manifest.label(final)

        try:
            ranks.together(begin)
            state_dict, dense_records = ranks.together(lambda: dense.collect(entries, state_of, dense.Sharding(groups)))
            table_records = ranks.together(lambda: _write_local(temporary, ranks.rank, owned, rng_states))
            ranks.together(lambda: dense.write(temporary, state_dict, groups))
            files = ranks.together(lambda: _file_records(temporary, ranks.rank, table_records))
            parts: list[Part] = ranks.gather((files, dense_records, table_records))
            label = ranks.gather(ranks.together(commit))[0]
        except CheckpointError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} was not written to {root}: {error}; the one before it is untouched: make "
                "room there and give the same command again"
            ) from error
    ranks.together(partial(_commit_tables, owned, label))
    return final


def _write_local(
    temporary: Path, rank: int, owned: Mapping[str, OwnedTable], rng_states: Mapping[str, Tensor]
) -> dict[str, TableRecord]:
    rng.write(temporary / rng.file_name(rank), rng_states)
    return {name: tables.write(temporary, table) for name, table in owned.items()}


def _commit_tables(owned: Mapping[str, OwnedTable], label: str) -> None:
    for table in owned.values():
        table.commit(label)


def _file_records(temporary: Path, rank: int, table_records: Mapping[str, TableRecord]) -> dict[str, FileRecord]:
    names = [rng.file_name(rank)]
    names += [path.relative_to(temporary).as_posix() for path in dense.files_of(temporary, rank)]
    names += [name for table in table_records.values() for name in table.files]
    return {name: record(temporary / name) for name in names}


def _manifest(temporary: Path, step: int, world_size: int, meta: Mapping[str, Any], parts: Sequence[Part]) -> Manifest:
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
        world_size=world_size,
        meta=plain_json(meta),
        files=files,
        dense=dense_records,
        tables={name: tables.merge([part[2][name] for part in parts if name in part[2]]) for name in sorted(names)},
    )


def _prune(root: Path, keep: int, step: int) -> None:
    try:
        directory.prune(root, keep=keep, step=step)
    except OSError as error:
        _log.warning("an old checkpoint could not be deleted: %s", error)
