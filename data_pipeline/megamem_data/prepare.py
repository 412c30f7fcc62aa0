"""``megamem data prepare``: from sources to a finished directory, or to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import KW_ONLY, InitVar, asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megamem.errors import ConfigError, DataError
from megamem_data.clustering import ClusterTree
from megamem_data.config import DataConfig
from megamem_data.directory import commit, describe_request, finished, workspace
from megamem_data.embedding import Embedder, SentenceEmbedder, TokenEmbedder
from megamem_data.encoding import encode_documents
from megamem_data.order import derive_key, held_out
from megamem_data.prepared import CLUSTERS, PATHS, Manifest, PreparedData, describe_file
from megamem_data.progress import Reporter
from megamem_data.shards import Shard, ShardInfo, ShardWriter, token_dtype
from megamem_data.sources import Portion, SourceCounts, read_documents
from megamem_data.tokenizer import Tokenizer, open_tokenizer
from megamem_data.tokenizer_training import train_tokenizer

_FIT_TOKENS = 16_000_000  # in the sample of documents that the embedding is fitted on
_EMBED_TOKENS = 1_000_000  # per call of the embedder


def prepare(
    config: DataConfig, *, branching: int, levels: int, seed: int, strict: bool = False, progress: bool = True
) -> PreparedData:
    """Read ``config.sources``, train or take the tokenizer, write shards, cluster the documents; the opened result.

    ``branching`` and ``levels`` shape the cluster tree (0 levels: none), ``seed`` keys every draw. Sources are read
    twice where a tokenizer is trained. Everything is written beside ``config.path`` and renamed at the end. A
    finished directory of the same request is used again, also for fewer levels. Raises DataError where the directory
    holds something else, or for bad input; ``strict`` also refuses invalid UTF-8 and binary files, which are
    otherwise replaced or left out, and counted.
    """
    return Job(config, branching=branching, levels=levels, seed=seed, strict=strict, progress=progress).run()


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A directory that becomes ``path`` if the body succeeds and is gone if not; errors of the machine become DataError."""
    try:
        with workspace(path) as folder:
            yield folder
            commit(folder, path)
    except OSError as error:
        raise DataError(
            f"data.path={path} cannot be written ({error}); free space there, or set another one"
        ) from error
    except BrokenProcessPool:
        raise DataError(
            "a process that encodes text was killed, most likely for lack of memory; set data.workers to fewer processes"
        ) from None


@dataclass
class Job:
    """One request: from its sources to a finished directory, at once or in portions (:mod:`megamem_data.parts`)."""

    config: DataConfig
    _: KW_ONLY
    branching: int
    levels: int
    seed: int
    strict: bool = False
    progress: InitVar[bool] = True

    def __post_init__(self, progress: bool) -> None:
        self.report = Reporter(progress)
        if not self.levels:
            self.branching = 0
        if not self.config.path:
            raise ConfigError("data.path is empty; set the directory that prepared data goes to")
        if not self.config.sources:
            raise ConfigError("data.sources is empty; name at least one corpus")

    @property
    def path(self) -> Path:
        """Where the result goes."""
        return Path(self.config.path)

    @cached_property
    def request(self) -> dict[str, Any]:
        """Everything that decides the result."""
        return describe_request(
            self.config, branching=self.branching, levels=self.levels, seed=self.seed, strict=self.strict
        )

    def run(self) -> PreparedData:
        """All of it on this machine; see :func:`prepare`."""
        if (existing := self.existing()) is not None:
            return existing
        with written(self.path) as folder:
            tokenizer = self.make_tokenizer(folder)
            infos, counts = self.encode(folder, tokenizer)
            manifest = self.finish(folder, tokenizer, infos, counts)
        return self.opened(manifest)

    def opened(self, manifest: Manifest) -> PreparedData:
        """The result, once it has its name; tells the user what it is."""
        self.report.line(_summary(self.path, manifest))
        return PreparedData.open(self.path)

    def existing(self) -> PreparedData | None:
        """The finished directory of this request, if it is there; DataError where the path holds something else."""
        data = finished(self.path, self.request)
        if data is not None:
            self.report.line(f"data: {self.path} is already prepared; nothing to do")
        return data

    def finish(self, folder: Path, tokenizer: Tokenizer, infos: list[ShardInfo], counts: SourceCounts) -> Manifest:
        """Cluster the documents of the shards ``infos`` in ``folder``, and write the manifest."""
        if not infos:
            raise DataError("data.sources hold no text; point them at documents that are not empty")
        if held_out(counts.documents, self.config.validation_fraction, self.seed).all():
            raise DataError(
                f"all {counts.documents} documents fall into the validation split; lower data.validation_fraction or "
                "add documents"
            )
        leaf_balance = self.cluster(folder, tokenizer, infos) if self.levels else 0.0
        manifest = Manifest(
            request=self.request,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            seed=self.seed,
            validation_fraction=self.config.validation_fraction,
            branching=self.branching,
            levels=self.levels,
            leaf_balance=leaf_balance,
            counts=asdict(counts),
            documents=sum(info.documents for info in infos),
            tokens=sum(info.tokens for info in infos),
            shards=[asdict(info) for info in infos],
            files={file.name: describe_file(file) for file in sorted(folder.iterdir())},
        )
        return manifest.write(folder)

    def make_tokenizer(self, folder: Path) -> Tokenizer:
        """The existing tokenizer, or one trained on all sources; its files are in ``folder``, which exists."""
        tokenizer: Tokenizer
        if self.config.tokenizer.model:
            tokenizer = open_tokenizer(self.config.tokenizer.model)
        else:
            with self.report.stage("data: reading text for the tokenizer", None, "documents") as advance:
                texts = self.documents(SourceCounts(), advance)
                tokenizer = train_tokenizer(texts, self.config.tokenizer, seed=self.seed)
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)
        return tokenizer

    def encode(
        self, folder: Path, tokenizer: Tokenizer, chosen: Sequence[Portion] | None = None
    ) -> tuple[list[ShardInfo], SourceCounts]:
        """Encode the documents of all sources, or of ``chosen`` portions of them, into shards in ``folder``."""
        counts = SourceCounts()
        dtype = token_dtype(tokenizer.vocab_size)
        writer = ShardWriter(folder, dtype=dtype, shard_tokens=self.config.shard_tokens)
        with self.report.stage("data: encoding", None, "documents") as advance:
            texts = self.documents(counts, advance, chosen)
            for tokens, lengths in encode_documents(texts, tokenizer, dtype=dtype, workers=self.config.workers):
                writer.add(tokens, lengths)
        return writer.close(), counts

    def documents(
        self, counts: SourceCounts, advance: Callable[[int], None], chosen: Sequence[Portion] | None = None
    ) -> Iterator[str]:
        """Texts of all sources or of ``chosen`` portions, counted as they are read."""
        for text in read_documents(self.config.sources, strict=self.strict, counts=counts, chosen=chosen):
            yield text
            advance(1)

    def cluster(self, folder: Path, tokenizer: Tokenizer, infos: list[ShardInfo]) -> float:
        """Write tree and paths; returns the documents of the largest leaf over the mean."""
        shards = [Shard(folder, info, token_dtype(tokenizer.vocab_size)) for info in infos]
        documents = sum(info.documents for info in infos)
        train = ~held_out(documents, self.config.validation_fraction, self.seed)
        with self.report.stage("data: embedding", documents, "documents") as advance:
            embedder = self.make_embedder(tokenizer, shards, train)
            scratch = folder / "embeddings.npy"
            embeddings: np.ndarray | None = None
            start = 0
            for tokens, lengths in _blocks(shards):
                found = embedder.embed(tokens, lengths)
                if embeddings is None:
                    shape = (documents, found.shape[1])
                    embeddings = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float32, shape=shape)
                embeddings[start : start + len(found)] = found
                start += len(found)
                advance(len(found))
        assert embeddings is not None
        with self.report.stage("data: clustering", documents, "documents") as advance:
            members = np.flatnonzero(train)
            tree = ClusterTree.fit(
                embedder, embeddings, members, branching=self.branching, levels=self.levels, seed=self.seed
            )
            paths = tree.descend(embeddings)
            advance(documents)
        scratch.unlink()
        tree.save(folder / CLUSTERS, tokenizer)
        np.save(folder / PATHS, paths, allow_pickle=False)
        return float(np.bincount(paths[:, -1]).max() * self.branching**self.levels / documents)

    def make_embedder(self, tokenizer: Tokenizer, shards: list[Shard], train: np.ndarray) -> Embedder:
        """The sentence encoder, or TF-IDF fitted on a sample of the documents ``train [documents]`` bool."""
        if self.config.encoder:
            return SentenceEmbedder(self.config.encoder, tokenizer)
        lengths = np.concatenate([shard.lengths for shard in shards])
        chosen = np.random.default_rng(derive_key("embedding", self.seed)).permutation(np.flatnonzero(train))
        sample = np.zeros_like(train)
        sample[chosen[: max(1, int(np.searchsorted(np.cumsum(lengths[chosen]), _FIT_TOKENS)))]] = True
        per_shard = np.split(sample, np.cumsum([len(shard.lengths) for shard in shards])[:-1])
        pairs = list(zip(shards, per_shard, strict=True))
        return TokenEmbedder.fit(
            np.concatenate([shard.tokens[np.repeat(part, shard.lengths)] for shard, part in pairs]),
            lengths[sample],
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dimensions=self.config.cluster_dimensions,
            seed=self.seed,
        )


def _blocks(shards: list[Shard]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and lengths of whole documents, about a million tokens at a time."""
    for shard in shards:
        ends = np.cumsum(shard.lengths)
        cuts = np.flatnonzero(np.diff(ends // _EMBED_TOKENS, prepend=0))
        for documents in np.split(np.arange(len(ends)), cuts):
            if len(documents):
                first, last = documents[0], documents[-1]
                yield shard.tokens[ends[first] - shard.lengths[first] : ends[last]], shard.lengths[first : last + 1]


def _summary(path: Path, manifest: Manifest) -> str:
    text = f"data: {manifest.documents:,} documents, {manifest.tokens:,} tokens of {manifest.vocab_size:,} in {path}"
    counts = manifest.counts
    if manifest.levels:
        clusters = manifest.branching**manifest.levels
        text += f"; {clusters:,} clusters, the largest {manifest.leaf_balance:.1f} times the mean"
    for name, what in (
        ("empty", "empty"),
        ("binary", "binary and left out"),
        ("invalid_utf8", "repaired (invalid UTF-8)"),
    ):
        if counts[name]:
            text += f"; {counts[name]:,} {what}"
    return text
