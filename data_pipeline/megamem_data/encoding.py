"""Documents to ids, in as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice

import numpy as np

from megamem_data.tokenizer import Tokenizer, load_tokenizer

_BATCH_CHARACTERS = 1 << 20

Encoded = tuple[np.ndarray, np.ndarray]
"""Documents that were encoded together: ids ``[tokens]`` with an end-of-document id after each document, and lengths
``[documents]`` int64 that count it."""


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer, *, dtype: type[np.integer], workers: int = 0
) -> Iterator[Encoded]:
    """Encode ``documents`` in order with ``workers`` processes (0: one per core), in batches of about a million
    characters."""
    workers = workers or len(os.sched_getaffinity(0))
    batches = _batches(documents)
    head = list(islice(batches, 2))
    if workers == 1 or len(head) < 2:  # not worth a process
        for texts in chain(head, batches):
            yield _encode(tokenizer, texts, dtype)
        return
    # Not forked: the caller may run threads. The queue of results is bounded because reading outruns encoding.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (dict(tokenizer.files), dtype)) as pool:
        pending: deque[Future[Encoded]] = deque()
        try:
            for texts in chain(head, batches):
                pending.append(pool.submit(_encode_in_worker, texts))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _encode(tokenizer: Tokenizer, texts: list[str], dtype: type[np.integer]) -> Encoded:
    ids = [np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=dtype) for text in texts]
    return np.concatenate(ids), np.array([len(i) for i in ids], dtype=np.int64)


_worker: tuple[Tokenizer, type[np.integer]]


def _start_worker(files: Mapping[str, bytes], dtype: type[np.integer]) -> None:
    global _worker
    _worker = (load_tokenizer(files, "the tokenizer"), dtype)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent was killed; the pool's pipes stay open among its workers, which would wait."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    tokenizer, dtype = _worker
    return _encode(tokenizer, texts, dtype)
