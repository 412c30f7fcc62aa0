"""Concatenate and chunk: the documents of a split, end to end, cut into windows of equal length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megamem.batch import MicroBatch


class TokenStream:
    """The chosen documents of some shards as one sequence of tokens, read without copying anything else.

    ``shards[i]`` holds the ids of shard ``i``, ``lengths[i]`` the tokens of each of its documents; ``chosen
    [documents]`` (bool, over all shards) selects documents.
    """

    def __init__(self, shards: Sequence[np.ndarray], lengths: Sequence[np.ndarray], chosen: np.ndarray) -> None:
        self._shards = shards
        self.documents: np.ndarray = np.flatnonzero(chosen)
        """``[n]`` int64, number of each document in the whole data."""
        shard = np.repeat(np.arange(len(lengths)), [len(part) for part in lengths])[self.documents]
        offset = np.concatenate([np.cumsum(part) - part for part in lengths])[self.documents]
        sizes = np.concatenate(lengths)[self.documents]
        self.starts: np.ndarray = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        """``[n + 1]`` int64, position of each document's first token in the stream, and the number of tokens."""
        # Runs: neighbours in one shard are one range of its file.
        new_run = (np.diff(self.documents, prepend=-2) != 1) | (np.diff(shard, prepend=-1) != 0)
        self._run_starts = np.append(self.starts[:-1][new_run], self.starts[-1])
        self._run_shard = shard[new_run]
        self._run_offset = offset[new_run]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def windows(self, seq_length: int) -> int:
        """Windows of ``seq_length`` inputs; the last label needs one token more, and a shorter rest is left out."""
        return max(0, (len(self) - 1) // seq_length)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill ``out [n]`` with the tokens from position ``start``; they must exist."""
        position, stop = start, start + len(out)
        run = int(np.searchsorted(self._run_starts, start, side="right")) - 1
        while position < stop:
            begin = int(self._run_starts[run])
            until = min(stop, int(self._run_starts[run + 1]))
            source = int(self._run_offset[run]) + position - begin
            out[position - start : until - start] = self._shards[self._run_shard[run]][
                source : source + until - position
            ]
            position, run = until, run + 1


def pack(
    stream: TokenStream, windows: np.ndarray, sample_ids: np.ndarray, seq_length: int, paths: np.ndarray
) -> MicroBatch:
    """The micro-batch of ``windows [b]``, numbered ``sample_ids [b]``; ``paths [documents, levels]`` covers the whole
    data."""
    b = len(windows)
    tokens = np.empty((b, seq_length + 1), dtype=np.int64)
    opens = np.zeros((b, seq_length + 1), dtype=bool)
    documents = []
    for row, window in enumerate(windows.tolist()):
        start = window * seq_length
        stream.read(start, tokens[row])
        first, label, end = np.searchsorted(stream.starts, [start + 1, start + seq_length, start + seq_length + 1])
        opens[row, stream.starts[first:end] - start] = True
        documents.append(stream.documents[first - 1 : label])
    crosses = opens[:, 1:]
    begins = opens[:, :-1].copy()
    begins[:, 0] = True
    return MicroBatch(
        sample_ids=sample_ids,
        tokens=np.ascontiguousarray(tokens[:, :-1]),
        labels=np.ascontiguousarray(tokens[:, 1:]),
        loss_mask=(~crosses).astype(np.float32),
        document_ids=(np.cumsum(begins, dtype=np.int32) - 1).reshape(b, seq_length),
        document_paths=np.asarray(paths[np.concatenate(documents)], dtype=np.int64),
    )
