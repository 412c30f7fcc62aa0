"""Embeddings of documents for the cluster tree: TF-IDF over the tokenizer's own ids, or a sentence encoder by name."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from megamem.errors import DataError
from megamem_data.tokenizer import Tokenizer


class Embedder(Protocol):
    """Turns documents into points of the unit sphere."""

    encoder: str
    """Name of the sentence encoder; empty for TF-IDF."""

    def embed(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Embeddings ``[documents, dimensions]`` float32 of unit length, of documents that lie one after another in
        ``tokens [n]``, ``lengths [documents]`` ids each. The result for a document does not depend on the others."""
        ...


class TokenEmbedder:
    """``normalise(sum over ids t of (1 + ln tf(t)) * idf(t) * components[:, t])``: TF-IDF and truncated SVD (LSA).

    ``idf [vocab_size]`` float32 is 0 for the end-of-document id; ``components [dimensions, vocab_size]`` float32.
    """

    encoder = ""

    def __init__(self, idf: np.ndarray, components: np.ndarray) -> None:
        self.idf = idf
        self.components = components

    @classmethod
    def fit(
        cls, tokens: np.ndarray, lengths: np.ndarray, *, vocab_size: int, eos_id: int, dimensions: int, seed: int
    ) -> TokenEmbedder:
        """Fit both parts on documents laid out as in :meth:`embed`; fewer dimensions where they span fewer."""
        counts = _counts(tokens, lengths, vocab_size)
        idf = TfidfTransformer(sublinear_tf=True).fit(counts).idf_.astype(np.float32)
        idf[eos_id] = 0
        weights = normalize(_weights(counts, idf))
        rank = min(dimensions, *weights.shape)
        components = randomized_svd(weights, rank, random_state=seed)[2]
        return cls(idf, np.ascontiguousarray(components, dtype=np.float32))

    def embed(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See :class:`Embedder`."""
        weights = _weights(_counts(tokens, lengths, len(self.idf)), self.idf)
        return normalize(weights @ self.components.T)


def _counts(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> scipy.sparse.csr_matrix:
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ones = np.ones(len(tokens), dtype=np.float32)
    counts = scipy.sparse.csr_matrix((ones, tokens.astype(np.int32), ends), shape=(len(lengths), vocab_size))
    counts.sum_duplicates()
    return counts


def _weights(counts: scipy.sparse.csr_matrix, idf: np.ndarray) -> scipy.sparse.csr_matrix:
    weights = counts.copy()
    weights.data = (1 + np.log(counts.data)) * idf[counts.indices]
    return weights


class SentenceEmbedder:
    """A ``sentence_transformers`` model on the decoded text."""

    def __init__(self, encoder: str, tokenizer: Tokenizer) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise DataError(
                f"data.encoder={encoder!r} needs the package sentence-transformers; install it, or leave "
                "data.encoder empty"
            ) from None
        try:
            self._model = SentenceTransformer(encoder)
        except Exception as error:
            raise DataError(
                f"data.encoder={encoder!r} cannot be loaded ({error}); set a name or folder that "
                "sentence_transformers loads"
            ) from error
        self.encoder = encoder
        self._tokenizer = tokenizer

    def embed(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See :class:`Embedder`."""
        texts = [self._tokenizer.decode(ids) for ids in np.split(tokens, np.cumsum(lengths)[:-1])]
        return normalize(np.asarray(self._model.encode(texts, show_progress_bar=False), dtype=np.float32))
