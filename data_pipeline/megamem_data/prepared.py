"""Prepared data on disk: what ``prepare`` writes and everything else opens.

``data.json`` (the manifest: counts, hashes and sizes of all other files), ``tokenizer.model`` or ``tokenizer.json`` with
the files beside it, ``shard_*.bin`` and ``.idx``; with a cluster tree also ``clusters.safetensors`` and ``paths.npy``
(``[documents, levels]`` int64).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megamem.errors import DataError
from megamem.files import TOKENIZER_FILES, fsync
from megamem_data.order import held_out
from megamem_data.packing import TokenStream
from megamem_data.shards import Shard, ShardInfo, token_dtype
from megamem_data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megamem_data.clustering import ClusterTree

FORMAT = "megamem-data-1"
MANIFEST = "data.json"
CLUSTERS = "clusters.safetensors"
PATHS = "paths.npy"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``data.json``."""

    format: str = FORMAT
    fingerprint: str = ""
    """Hash of what training reads: the files but for the cluster tree, and what decides the split."""
    request: dict[str, Any]
    """What was asked for; a directory is reused for the same request only."""
    vocab_size: int
    eos_id: int
    seed: int
    validation_fraction: float
    branching: int
    levels: int
    leaf_balance: float
    """Documents in the largest leaf of the cluster tree over the mean; 0 without a tree."""
    counts: dict[str, int]
    """Documents read, left out and repaired."""
    documents: int
    tokens: int
    shards: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    """Bytes and sha256 of every other file."""

    @property
    def content(self) -> str:
        """The fingerprint that the other fields give."""
        decisive = [self.vocab_size, self.eos_id, self.seed, self.validation_fraction, self.branching, self.levels]
        # The tree acts through the paths alone, and safetensors writes its metadata in a random order.
        files = {name: entry for name, entry in self.files.items() if name != CLUSTERS}
        text = json.dumps([self.format, decisive, self.shards, files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path) -> Manifest:
        """Write ``data.json``; returns the manifest with its fingerprint."""
        complete = replace(self, fingerprint=self.content)
        path = folder / MANIFEST
        path.write_text(json.dumps(asdict(complete), indent=1) + "\n", encoding="utf-8")
        fsync(path)
        return complete

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``data.json``; DataError where it is missing, damaged or of another format."""
        path = folder / MANIFEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if (found := fields["format"]) != FORMAT:
                raise DataError(f"{path} has the format {found!r}, not {FORMAT!r}; delete its folder and prepare again")
            manifest = cls(**fields)
            intact = manifest.fingerprint == manifest.content
        except FileNotFoundError:
            raise DataError(
                f"{folder} holds no prepared data; run `megamem data prepare`, or set data.path to prepared data"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}); delete its folder and prepare again") from None
        if not intact:
            raise DataError(f"{path} does not match its fingerprint; delete its folder and prepare again")
        return manifest


@dataclass(frozen=True)
class PreparedData:
    """Prepared data, opened and checked. Splits are views of memory-mapped files."""

    path: Path
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False, rank: int = 0, ranks: int = 1) -> PreparedData:
        """Open ``path``; DataError names the file that is missing or damaged.

        Sizes, headers, counts and the hashes of tokenizer and cluster tree are always checked; ``verify`` also hashes
        this rank's share of all files, which together with those of the other ``ranks`` are all.
        """
        folder = Path(path)
        data = cls(folder, Manifest.read(folder))
        by_size = sorted(data.manifest.files.items(), key=lambda item: (-item[1]["bytes"], item[0]))
        for number, (name, expected) in enumerate(by_size):
            mine = verify and number % ranks == rank
            check_file(folder / name, expected, hashed=mine or name in (*TOKENIZER_FILES, CLUSTERS))
        if data.document_paths.shape != (data.manifest.documents, data.levels):
            raise DataError(
                f"{folder / PATHS} does not hold one path per document; delete its folder and prepare again"
            )
        if len(data.lengths) != data.manifest.documents:
            raise DataError(
                f"{folder / MANIFEST} counts other documents than its shards; delete its folder and prepare again"
            )
        return data

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer."""
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        """Id that ends every document."""
        return self.manifest.eos_id

    @property
    def fingerprint(self) -> str:
        """Hash of what training reads: the same data wherever it was prepared."""
        return self.manifest.fingerprint

    @property
    def levels(self) -> int:
        """Depth of the cluster tree; 0 for none."""
        return self.manifest.levels

    @property
    def branching(self) -> int:
        """Children per cluster; 0 without a tree."""
        return self.manifest.branching

    @property
    def tokenizer_model(self) -> Path:
        """The file that decides about ids: a sentencepiece model or a ``tokenizer.json``."""
        return self.path / next(name for name in TOKENIZER_FILES if name in self.manifest.files)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded."""
        names = [name for name in TOKENIZER_FILES if name in self.manifest.files]
        return load_tokenizer({name: (self.path / name).read_bytes() for name in names}, str(self.path))

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, memory-mapped."""
        dtype = token_dtype(self.vocab_size)
        return tuple(Shard(self.path, ShardInfo(**info), dtype) for info in self.manifest.shards)

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[documents]`` int64, tokens of each document, its end-of-document id included."""
        return np.concatenate([shard.lengths for shard in self.shards])

    @cached_property
    def document_paths(self) -> np.ndarray:
        """``[documents, levels]`` int64, cluster of each document at every level (see
        ``MicroBatch.document_paths``)."""
        if not self.levels:
            return np.empty((self.manifest.documents, 0), dtype=np.int64)
        try:
            return np.load(self.path / PATHS, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{self.path / PATHS} is damaged ({error}); delete its folder and prepare again") from None

    @cached_property
    def clusters(self) -> ClusterTree | None:
        """The cluster tree, which gives new text its path; None without a tree."""
        from megamem_data.clustering import ClusterTree

        return ClusterTree.load(self.path / CLUSTERS, self.tokenizer) if self.levels else None

    def documents(self, split: Literal["train", "validation"]) -> np.ndarray:
        """``[n]`` int64, numbers of the documents of a split."""
        return np.flatnonzero(self._chosen(split))

    def stream(self, split: Literal["train", "validation"]) -> TokenStream:
        """The tokens of a split; valid as long as this object."""
        return TokenStream(
            [shard.tokens for shard in self.shards], [shard.lengths for shard in self.shards], self._chosen(split)
        )

    def _chosen(self, split: Literal["train", "validation"]) -> np.ndarray:
        validation = held_out(self.manifest.documents, self.manifest.validation_fraction, self.manifest.seed)
        return validation if split == "validation" else ~validation


def describe_file(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, which is on disk when this returns."""
    fsync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def check_file(path: Path, expected: dict[str, Any], *, hashed: bool) -> None:
    """DataError where a file is missing, has another size or, with ``hashed``, another sha256."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DataError(
                f"{path} has {size:,} bytes in place of {expected['bytes']:,}; delete its folder and prepare again"
            )
        if hashed:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    raise DataError(f"{path} does not match its checksum; delete its folder and prepare again")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); delete its folder and prepare again") from None
