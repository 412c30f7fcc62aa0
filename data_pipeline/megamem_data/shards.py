"""Token shards in Megatron-LM's indexed format: ``NAME.bin`` holds the ids, ``NAME.idx`` the length of each document.

One document is one sequence, ended by the end-of-document id; documents never straddle shards. The files are what
``megatron.core.datasets.indexed_dataset`` reads and writes, so Megatron-LM's own tools open them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megamem.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What the manifest says of one shard."""

    name: str
    documents: int
    tokens: int


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Type of the stored ids: uint16 below 65,500 entries, else int32 (megatron's rule)."""
    return DType.optimal_dtype(vocab_size)


class ShardWriter:
    """Writes documents to ``shard_00000``, ``shard_00001``, ...; a shard ends with the document that fills it."""

    def __init__(self, folder: Path, *, dtype: type[np.integer], shard_tokens: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._builder: IndexedDatasetBuilder | None = None
        self._documents = self._tokens = 0
        self._shards: list[ShardInfo] = []

    @property
    def _name(self) -> str:
        return f"shard_{len(self._shards):05d}"

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: ids ``[tokens]`` and the length of each document, ``[documents]``."""
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            if self._builder is None:
                self._builder = IndexedDatasetBuilder(str(self._folder / f"{self._name}.bin"), dtype=self._dtype)
            self._builder.add_document(document, [len(document)])
            self._documents += 1
            self._tokens += len(document)
            if self._tokens >= self._shard_tokens:
                self._finish()

    def close(self) -> list[ShardInfo]:
        """Finish the last shard; all shards in order."""
        self._finish()
        return self._shards

    def _finish(self) -> None:
        if self._builder is None:
            return
        self._builder.finalize(str(self._folder / f"{self._name}.idx"))
        self._shards.append(ShardInfo(name=self._name, documents=self._documents, tokens=self._tokens))
        self._builder, self._documents, self._tokens = None, 0, 0


class Shard:
    """An open shard. ``tokens [n]`` is a view of the mapped file and lives only as long as the object."""

    def __init__(self, folder: Path, info: ShardInfo, dtype: type[np.integer]) -> None:
        prefix = folder / info.name
        try:
            self._dataset = IndexedDataset(str(prefix))
        except (AssertionError, ValueError, OSError) as error:
            raise DataError(f"{prefix}.idx is damaged ({error}); delete its folder and prepare again") from None
        self.lengths: np.ndarray = self._dataset.sequence_lengths.astype(np.int64)
        """``[documents]`` int64, tokens of each document."""
        found = (self._dataset.index.dtype, len(self.lengths), int(self.lengths.sum()))
        if found != (dtype, info.documents, info.tokens):
            raise DataError(
                f"{prefix}.idx does not describe the shard of data.json; delete its folder and prepare again"
            )
        self.tokens: np.ndarray = self._dataset.bin_reader.read(dtype, info.tokens, 0)
