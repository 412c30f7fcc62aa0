"""The n-gram hash beside the vectorised form of published code, per CPU-second, with buffers reused on both sides."""

from __future__ import annotations

import numpy as np
import torch
from harness import Case, Contender, Options

from megamem_kernels.ngram_hash import ngram_hash
from megamem_kernels.ngram_hash.reference import ngram_hash_vectorized

_VOCABULARY = 99_092
_ROWS_PER_HEAD = 2_262_400


def cases(options: Options) -> list[Case]:
    """Orders 2 and 3 with 8 heads each over a vocabulary and tables of the published sizes, one document in two."""
    generator = np.random.default_rng(options.seed)
    batch, length = (2, 64) if options.quick else (8, 2048)
    tokens = generator.integers(0, _VOCABULARY, (batch, length))
    documents = np.repeat(np.arange(2 * batch).reshape(batch, 2), length // 2, axis=1)
    sizes = _ROWS_PER_HEAD + 1 + 2 * generator.permutation(_ROWS_PER_HEAD // 2)[:16]
    constants = {
        "multipliers": 2 * generator.integers(0, (2**63 - 1) // _VOCABULARY // 2, 3) + 1,
        "primes": sizes.reshape(2, 8),
        "offsets": np.cumsum(sizes) - sizes,
        "pad_id": 2,
    }
    out, peer_out = torch.empty(2, batch, length, 16, dtype=torch.int64).numpy()
    scratch = np.empty((2, batch, length), dtype=np.int64)

    def ours() -> np.ndarray:
        return ngram_hash(tokens, documents, **constants, out=out)

    def peer() -> np.ndarray:
        return ngram_hash_vectorized(tokens, documents, **constants, out=peer_out, scratch=scratch)

    if not np.array_equal(ours(), peer()):
        raise AssertionError("the two forms of the n-gram hash disagree")
    return [
        Case(
            f"n-gram hash, {tokens.size} tokens x 16 rows",
            [Contender("megamem", ours), Contender("numpy, as the published demo", peer)],
            unit_bytes=out.nbytes,
            cpu_time=True,
            bars={"numpy, as the published demo": 6.0},
        )
    ]
