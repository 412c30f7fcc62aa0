"""The tree of document clusters that addresses hierarchical memories (arXiv 2510.02375, section 3 and appendix C).

Built from the root down: every node splits its documents by balanced k-means. A document's path is found by greedy
descent, ``branching`` comparisons per level, for training documents and new text alike.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save
from sklearn.cluster import kmeans_plusplus

from megamem.errors import DataError
from megamem_data.embedding import Embedder, SentenceEmbedder, TokenEmbedder
from megamem_data.order import derive_key
from megamem_data.tokenizer import Tokenizer

_FORMAT = "megamem-clusters-1"
_STEPS = 20
_SAMPLES_PER_STEP = 6400
_OVERFULL = 1.5
_CHUNK = 4096
_NOWHERE = 1e3
"""Coordinate of the centroids that a node with few documents does not use: far from the unit sphere, so never the
nearest."""


class ClusterTree:
    """Embedder and centroids. ``centroids[l]`` is ``[branching ** l, branching, dimensions]`` float32: the children
    of every node at depth ``l``. The cluster ids of a path are prefixes: at level ``l`` (from 1) they lie in ``[0,
    branching ** l)``, and ``id // branching`` is the id one level up.
    """

    def __init__(self, embedder: Embedder, centroids: list[np.ndarray]) -> None:
        self.embedder = embedder
        self.centroids = centroids

    @property
    def levels(self) -> int:
        """Depth of the tree."""
        return len(self.centroids)

    @property
    def branching(self) -> int:
        """Children of a node."""
        return self.centroids[0].shape[1]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides a path."""
        digest = hashlib.sha256(f"{_FORMAT}/{self.embedder.encoder}".encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"/{name}{tensor.shape}".encode())
            digest.update(tensor.tobytes())
        return digest.hexdigest()

    @classmethod
    def fit(
        cls, embedder: Embedder, embeddings: np.ndarray, members: np.ndarray, *, branching: int, levels: int, seed: int
    ) -> ClusterTree:
        """Build the tree on the rows ``members [n]`` of ``embeddings [documents, dimensions]``, float32 of unit
        length."""
        dimensions = embeddings.shape[1]
        nodes = np.zeros(len(members), dtype=np.int64)
        centroids = []
        for level in range(levels):
            children = np.full((branching**level, branching, dimensions), _NOWHERE, dtype=np.float32)
            order = np.argsort(nodes, kind="stable")
            starts = np.searchsorted(nodes[order], np.arange(branching**level + 1))
            for node in range(branching**level):
                inside = members[order[starts[node] : starts[node + 1]]]
                rng = np.random.default_rng(derive_key("clusters", seed, level, node))
                found = balanced_kmeans(embeddings, inside, branching, rng)
                children[node, : len(found)] = found
            centroids.append(children)
            nodes = nodes * branching + _nearest(embeddings, members, nodes, children)
        return cls(embedder, centroids)

    def descend(self, embeddings: np.ndarray) -> np.ndarray:
        """Paths ``[n, levels]`` int64 of ``embeddings [n, dimensions]``."""
        everyone = np.arange(len(embeddings))
        paths = np.zeros((len(embeddings), self.levels), dtype=np.int64)
        nodes = np.zeros(len(embeddings), dtype=np.int64)
        for level, children in enumerate(self.centroids):
            nodes = nodes * self.branching + _nearest(embeddings, everyone, nodes, children)
            paths[:, level] = nodes
        return paths

    def assign(self, token_ids: np.ndarray | list[int]) -> np.ndarray:
        """Path ``[levels]`` int64 of one text, such as a prompt; for a document of the data, the path that it was
        given."""
        tokens = np.asarray(token_ids, dtype=np.int64)
        return self.descend(self.embedder.embed(tokens, np.array([len(tokens)])))[0]

    def save(self, path: Path, tokenizer: Tokenizer) -> None:
        """Write one safetensors file: ``level{l}.centroids`` (l from 1), and ``idf`` and ``components`` without an
        encoder."""
        metadata = {
            "format": _FORMAT,
            "branching": str(self.branching),
            "levels": str(self.levels),
            "encoder": self.embedder.encoder,
            "tokenizer_sha256": tokenizer.sha256,
            "fingerprint": self.fingerprint,
        }
        path.write_bytes(save(self._tensors(), metadata))  # save_file makes it unreadable for others

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer) -> ClusterTree:
        """Read what :meth:`save` wrote; DataError for a damaged file or one that belongs to another tokenizer."""
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); delete its folder and prepare again") from None
        if metadata.get("format") != _FORMAT:
            raise DataError(f"{path} is no cluster tree of the format {_FORMAT}; delete its folder and prepare again")
        if metadata["tokenizer_sha256"] != tokenizer.sha256:
            raise DataError(f"{path} was built with another tokenizer; delete its folder and prepare again")
        embedder: Embedder
        if metadata["encoder"]:
            embedder = SentenceEmbedder(metadata["encoder"], tokenizer)
        else:
            embedder = TokenEmbedder(tensors["idf"], tensors["components"])
        tree = cls(embedder, [tensors[f"level{level}.centroids"] for level in range(1, int(metadata["levels"]) + 1)])
        if tree.fingerprint != metadata["fingerprint"]:
            raise DataError(f"{path} does not match its fingerprint; delete its folder and prepare again")
        return tree

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {f"level{level}.centroids": tensor for level, tensor in enumerate(self.centroids, start=1)}
        if isinstance(self.embedder, TokenEmbedder):
            tensors |= {"idf": self.embedder.idf, "components": self.embedder.components}
        return tensors


def balanced_kmeans(embeddings: np.ndarray, members: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """At most ``clusters`` centroids ``[n, dimensions]`` of the rows ``members`` of ``embeddings``; fewer for fewer
    members.

    k-means++ and 20 EM steps on 6,400 fresh samples each (all members where there are fewer). A cluster that holds
    more than 1.5 times its even share of a step gives half of its samples, drawn at random, to the smallest cluster.
    """
    if len(members) <= clusters:
        return np.array(embeddings[members])
    sample = _sample(members, rng)
    centroids, _ = kmeans_plusplus(embeddings[sample], clusters, random_state=int(rng.integers(2**31)))
    for _ in range(_STEPS):
        nearest = _nearest(embeddings, sample, np.zeros_like(sample), centroids[None])
        labels = _rebalance(nearest, clusters, rng)
        counts = np.bincount(labels, minlength=clusters)
        sums = np.zeros_like(centroids, dtype=np.float64)
        np.add.at(sums, labels, embeddings[sample])
        filled = counts > 0
        centroids[filled] = sums[filled] / counts[filled, None]
        sample = _sample(members, rng)
    return centroids


def _sample(members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if len(members) <= _SAMPLES_PER_STEP:
        return members
    return np.sort(rng.choice(members, _SAMPLES_PER_STEP, replace=False))


def _rebalance(labels: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    limit = _OVERFULL * len(labels) / clusters
    for _ in range(clusters):
        counts = np.bincount(labels, minlength=clusters)
        if counts.max() <= max(limit, 1):
            break
        members = np.flatnonzero(labels == counts.argmax())
        labels[rng.permutation(members)[: len(members) // 2]] = counts.argmin()
    return labels


def _nearest(embeddings: np.ndarray, members: np.ndarray, nodes: np.ndarray, children: np.ndarray) -> np.ndarray:
    """Child nearest to each of the rows ``members [n]``, among ``children[nodes[i]]``. Differences are summed row by
    row (no matrix product), so that the answer for a document is the same alone and in a batch."""
    nearest = np.empty(len(members), dtype=np.int64)
    for start in range(0, len(members), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        distances = np.square(embeddings[members[chunk], None, :] - children[nodes[chunk]]).sum(axis=2)
        nearest[chunk] = distances.argmin(axis=1)
    return nearest
