"""A checkpoint on disk, read without any process group."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamem.errors import CheckpointError
from megamem_checkpoints import dense, tables
from megamem_checkpoints.directory import open_manifest
from megamem_checkpoints.files import check_content, in_parallel, share
from megamem_checkpoints.manifest import DenseRecord, TableRecord
from megamem_checkpoints.tables import OpenFiles
from megamem_kernels.formats import FormatName
from megamem_kernels.row_gather import dequantize_rows


class CheckpointReader:
    """Opens ``path``; CheckpointError unless it is a whole checkpoint of a known format (contents: :meth:`verify`). Dense files
    are read by ``threads`` at once."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        self.path = path
        self._threads = threads
        self.manifest = open_manifest(path)

    @property
    def step(self) -> int:
        """Optimizer steps that were done when it was written."""
        return self.manifest.step

    @property
    def meta(self) -> dict[str, Any]:
        """What the run handed in: configuration, data state, counters, layout."""
        return self.manifest.meta

    @property
    def label(self) -> str:
        """See :meth:`~megamem_checkpoints.manifest.Manifest.label`."""
        return self.manifest.label(self.path)

    def names(self) -> list[str]:
        """Canonical names of the dense tensors, sorted."""
        return sorted(self.manifest.dense)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a dense tensor."""
        return tuple(self._dense(name).shape)

    def tensor(self, name: str) -> Tensor:
        """A dense weight or buffer: the whole tensor, fp32."""
        return self._read(name, dense.MASTER)

    def moments(self, name: str) -> dict[str, Tensor]:
        """Optimizer state of a dense weight (``exp_avg``, ``exp_avg_sq``), fp32, whole; empty for a buffer."""
        return {moment: self._read(name, moment) for moment in self._dense(name).moments}

    def tables(self) -> dict[str, tuple[int, int]]:
        """``(rows, width)`` of every memory table."""
        return {name: (record.rows, record.width) for name, record in self.manifest.tables.items()}

    def format(self, table: str) -> FormatName:
        """How the rows of a table are stored, see :func:`megamem_kernels.formats.row_fields`."""
        return self._table(table).format

    def rows(self, table: str, start: int, stop: int) -> Tensor:
        """Logical rows ``[start, stop)`` of a table: ``[stop - start, width]`` fp32, exactly what its format stores."""
        return dequantize_rows(
            self.stored_rows(table, start, stop), torch.empty(stop - start, self._table(table).width)
        )

    def stored_rows(self, table: str, start: int, stop: int) -> dict[str, Tensor]:
        """Logical rows ``[start, stop)`` of a table by the fields of its format, ``[stop - start, ...]`` each, as stored."""
        record = self._table(table)
        if not 0 <= start <= stop <= record.rows:
            raise ValueError(f"rows [{start}, {stop}) of table {table}, which has {record.rows}")
        placement = tables.placement_of(record)
        if placement.multiplier == 1:
            return tables.read(self.table_files, record, range(start, stop), state=False)
        return tables.read(self.table_files, record, placement.positions(np.arange(start, stop)), state=False)

    def verify(self, rank: int = 0, ranks: int = 1, *, threads: int = 1) -> None:
        """Check the content of every file, or of one rank's share; CheckpointError naming the first damaged one."""

        def check(name: str) -> None:
            check_content(self.path, name, self.manifest.files[name])

        in_parallel(threads, check, share(self.manifest.files, rank, ranks))

    @cached_property
    def dense_reader(self) -> dense.Reader:
        """The storage reader of the dense part."""
        return dense.Reader(self.path / dense.FOLDER, self._threads)

    @cached_property
    def table_files(self) -> OpenFiles:
        """The files of the tables."""
        return OpenFiles(self.path)

    def _read(self, name: str, state: str) -> Tensor:
        target = torch.empty(self.shape(name), dtype=torch.float32)
        dense.read(self.dense_reader, {dense.key_of(state, name): target})
        return target

    def _dense(self, name: str) -> DenseRecord:
        try:
            return self.manifest.dense[name]
        except KeyError:
            raise CheckpointError(f"checkpoint {self.path} has no tensor {name}") from None

    def _table(self, name: str) -> TableRecord:
        try:
            return self.manifest.tables[name]
        except KeyError:
            raise CheckpointError(f"checkpoint {self.path} has no table {name}") from None
