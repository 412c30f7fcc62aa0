"""Embeddings and the cluster tree."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from megamem.errors import DataError
from megamem_data.clustering import ClusterTree, balanced_kmeans
from megamem_data.config import TokenizerConfig
from megamem_data.embedding import SentenceEmbedder, TokenEmbedder
from megamem_data.tokenizer import SentencePieceTokenizer
from megamem_data.tokenizer_training import train_tokenizer

VOCAB, EOS = 300, 1


def topics(documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of four topics that use ids 10-59, 60-109, ... each; tokens, lengths and topics."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(4, size=documents)
    lengths = rng.integers(20, 90, size=documents)
    parts = [np.append(10 + 50 * t + rng.integers(50, size=n - 1), EOS) for t, n in zip(topic, lengths, strict=True)]
    return np.concatenate(parts), lengths, topic


def fit(documents: int, branching: int, levels: int, dimensions: int = 8) -> tuple[ClusterTree, np.ndarray]:
    tokens, lengths, _ = topics(documents)
    embedder = TokenEmbedder.fit(tokens, lengths, vocab_size=VOCAB, eos_id=EOS, dimensions=dimensions, seed=1)
    embeddings = embedder.embed(tokens, lengths)
    tree = ClusterTree.fit(embedder, embeddings, np.arange(documents), branching=branching, levels=levels, seed=2)
    return tree, tree.descend(embeddings)


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    text = "\n".join(f"{a} and {b} make {a + b} in all" for a in range(30) for b in range(30))
    return train_tokenizer([text], TokenizerConfig(vocab_size=285), seed=0)


def test_embedding_is_the_documented_formula() -> None:
    tokens, lengths, _ = topics(50)
    embedder = TokenEmbedder.fit(tokens, lengths, vocab_size=VOCAB, eos_id=EOS, dimensions=8, seed=1)
    assert embedder.idf[EOS] == 0 and embedder.components.shape == (8, VOCAB)
    used, counts = np.unique(tokens[: lengths[0]], return_counts=True)
    projected = ((1 + np.log(counts)) * embedder.idf[used]) @ embedder.components[:, used].T
    expected = projected / np.linalg.norm(projected)
    np.testing.assert_allclose(embedder.embed(tokens, lengths)[0], expected, atol=1e-6)


def test_topics_become_clusters() -> None:
    _, _, topic = topics(400)
    _, paths = fit(400, branching=4, levels=1)
    pairs = {(int(a), int(b)) for a, b in zip(topic, paths[:, 0], strict=True)}
    assert len(pairs) == 4


def test_paths_are_prefixes_and_new_text_gets_the_stored_path() -> None:
    tree, paths = fit(300, branching=3, levels=3)
    assert paths.dtype == np.int64 and paths.shape == (300, 3)
    assert paths.min() >= 0 and all(paths[:, level].max() < 3 ** (level + 1) for level in range(3))
    assert np.array_equal(paths[:, 1] // 3, paths[:, 0]) and np.array_equal(paths[:, 2] // 3, paths[:, 1])
    assert len(np.unique(paths[:, 2])) == 27
    tokens, lengths, _ = topics(300)
    for number, document in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        assert np.array_equal(tree.assign(document), paths[number])
        assert np.array_equal(tree.assign(document[:-1].tolist()), paths[number])  # a prompt is not closed


def test_fit_is_deterministic_and_shallower_trees_are_prefixes() -> None:
    deep, paths = fit(120, branching=3, levels=2)
    again, _ = fit(120, branching=3, levels=2)
    shallow, few = fit(120, branching=3, levels=1)
    assert deep.fingerprint == again.fingerprint != shallow.fingerprint
    assert np.array_equal(few, paths[:, :1])


@pytest.mark.parametrize("documents", [1, 2, 5])
def test_fewer_documents_than_clusters(documents: int) -> None:
    tree, paths = fit(documents, branching=4, levels=2)
    assert np.isfinite(np.concatenate([level.ravel() for level in tree.centroids])).all()
    assert paths.min() >= 0 and (paths.max(axis=0) < [4, 16]).all()
    assert len(np.unique(paths[:, 1])) == documents  # every document is a leaf of its own
    unseen = tree.assign([250, 251])
    assert unseen.shape == (2,) and unseen[1] // 4 == unseen[0]


def test_balancing_splits_what_plain_kmeans_leaves_together() -> None:
    rng = np.random.default_rng(0)
    # nine tenths of the points in one blob, the rest far away in three
    centres = np.repeat(np.eye(4), [900, 34, 33, 33], axis=0)
    points = (centres + 0.05 * rng.standard_normal(centres.shape)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    centroids = balanced_kmeans(points, np.arange(1000), 4, np.random.default_rng(1))
    nearest = np.square(points[:, None] - centroids).sum(axis=2).argmin(axis=1)
    from sklearn.cluster import KMeans

    plain = np.bincount(KMeans(4, n_init=1, random_state=0).fit_predict(points))
    assert plain.max() == 900
    assert np.bincount(nearest, minlength=4).max() < 600


def test_identical_documents_do_no_harm() -> None:
    points = np.tile(np.array([0.6, 0.8], dtype=np.float32), (50, 1))
    centroids = balanced_kmeans(points, np.arange(50), 4, np.random.default_rng(0))
    np.testing.assert_allclose(centroids, points[:4])


def test_tree_survives_its_file(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    tree, paths = fit(90, branching=3, levels=2)
    path = tmp_path / "clusters.safetensors"
    tree.save(path, tokenizer)
    loaded = ClusterTree.load(path, tokenizer)
    assert loaded.fingerprint == tree.fingerprint and (loaded.branching, loaded.levels) == (3, 2)
    tokens, lengths, _ = topics(90)
    assert np.array_equal(loaded.assign(tokens[: lengths[0]]), paths[0])
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="does not match its fingerprint"):
        ClusterTree.load(path, tokenizer)
    path.write_bytes(content[:100])
    with pytest.raises(DataError, match="cannot be read"):
        ClusterTree.load(path, tokenizer)
    tree.save(path, tokenizer)
    other = train_tokenizer(["some other text\n" * 50], TokenizerConfig(vocab_size=270), seed=0)
    with pytest.raises(DataError, match="another tokenizer"):
        ClusterTree.load(path, other)


def test_sentence_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DataError, match="needs the package sentence-transformers"):
        SentenceEmbedder("mini", tokenizer)

    class Model:
        """Stands for SentenceTransformer: counts two letters."""

        def __init__(self, name: str) -> None:
            if name != "mini":
                raise OSError(f"{name} not found")

        def encode(self, texts: list[str], show_progress_bar: bool) -> np.ndarray:
            return np.array([[text.count("a"), text.count("n") + 1] for text in texts], dtype=np.float64)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    with pytest.raises(DataError, match=r"data\.encoder='other' cannot be loaded"):
        SentenceEmbedder("other", tokenizer)
    embedder = SentenceEmbedder("mini", tokenizer)
    ids = [tokenizer.encode("and a"), tokenizer.encode("nnn"), tokenizer.encode("1 2 3")]
    embeddings = embedder.embed(np.concatenate(ids), np.array([len(i) for i in ids]))
    np.testing.assert_allclose(embeddings, [[0.7071068, 0.7071068], [0.0, 1.0], [0.0, 1.0]], atol=1e-6)
    tree = ClusterTree.fit(embedder, embeddings, np.arange(3), branching=3, levels=1, seed=0)
    tree.save(tmp_path / "tree.safetensors", tokenizer)
    loaded = ClusterTree.load(tmp_path / "tree.safetensors", tokenizer)
    assert loaded.embedder.encoder == "mini"
    assert np.array_equal(loaded.assign(ids[0]), [0])
