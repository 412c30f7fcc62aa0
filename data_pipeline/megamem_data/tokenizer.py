"""Sentencepiece: training, exact encoding, parallel encoding.

A trained model has no ``<s>`` and no padding entry: id 0 is ``<unk>`` (never produced, bytes stand for unknown
characters), id 1 is ``</s>``, which ends every document; ids 2 to 257 are the bytes. Text is taken as it is (identity
normalisation, white space kept, no prefix space), digits are single pieces and runs of spaces may be one piece. With
these settings and type ``bpe``, Hugging Face's ``AutoTokenizer`` gives the same ids on a folder that holds the file
as ``tokenizer.model`` when it is called with ``split_special_tokens=True``; a prefix space would break that.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megamem.errors import DataError
from megamem_data.config import TokenizerConfig
from megamem_data.order import derive_key

_LINE_CHARACTERS = 4096  # of the training sample; sentencepiece drops longer lines, so they are cut
_BATCH_CHARACTERS = 1 << 20


class Tokenizer:
    """A sentencepiece model. ``model`` is the content of its file, ``origin`` names it in errors (DataError)."""

    def __init__(self, model: bytes, origin: str = "tokenizer.model") -> None:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = processor.vocab_size()
            self.eos_id: int = processor.eos_id()
        except RuntimeError as error:
            raise DataError(f"{origin} is no sentencepiece model ({error}); set data.tokenizer.model to one") from None
        if self.vocab_size == 0 or self.eos_id < 0:
            raise DataError(
                f"{origin} has no end-of-document entry; set data.tokenizer.model to a model with an eos_id"
            )
        self.model = model
        self._processor = processor
        self._by_line = _lines_are_independent(model)

    @property
    def sha256(self) -> str:
        """Hash of the model file."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without an end-of-document id."""
        if not self._by_line:
            return self._processor.encode(text)
        # The same ids; a document of 31 MB takes a quarter of the time and 0.6 in place of 1.4 GB.
        return list(chain.from_iterable(self._processor.encode(re.findall(r"[^\n]*\n|[^\n]+", text))))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; end-of-document ids leave nothing."""
        return self._processor.decode([int(i) for i in ids])


def _lines_are_independent(model: bytes) -> bool:
    """Whether a text's ids are those of its lines one after another: no piece crosses a line end, no rule looks past
    it. Never so for unigram models, whose scores are summed over the whole text in fp32, which decides near-ties."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    return (
        trainer.model_type == trainer.BPE
        and rules.name == "identity"
        and not rules.add_dummy_prefix
        and not rules.remove_extra_whitespaces
        and trainer.byte_fallback
        and not any("\n" in piece.piece[:-1] for piece in proto.pieces)
    )


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig, *, seed: int) -> Tokenizer:
    """A tokenizer of ``config.vocab_size`` entries, trained on a sample of the lines of ``documents``.

    Raises DataError where the sample is empty, or needs more or supports fewer entries, with the number to set.
    """
    lines = sample_lines(documents, config.train_lines, seed)
    if not lines:
        raise DataError("data.sources hold no text; point them at documents that are not empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.type,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _LINE_CHARACTERS + 1,
            num_threads=16,  # part of the result: unigram sums its counts per thread
            minloglevel=2,
        )
    except RuntimeError as error:
        message = str(error)
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            advice = (
                "is too small for 256 bytes, 2 special entries and this corpus's characters; set it to at least "
                f"{found[1]}"
            )
        elif found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
            advice = f"is more than this corpus supports; lower it to at most {found[1]}, or add text"
        else:
            raise DataError(f"sentencepiece could not train the tokenizer of data.tokenizer: {message}") from error
        raise DataError(f"data.tokenizer.vocab_size={config.vocab_size} {advice}") from None
    return Tokenizer(model.getvalue())


def sample_lines(documents: Iterable[str], count: int, seed: int) -> list[str]:
    """At most ``count`` lines that hold more than white space, uniformly over all documents, in corpus order.

    Every line draws a priority from a generator of its document, and the ``count`` lowest stay.
    """
    lines: list[str] = []
    priorities: list[float] = []
    highest = 1.0
    for number, text in enumerate(documents):
        found = [
            line[start : start + _LINE_CHARACTERS]
            for line in text.split("\n")
            if line.strip()
            for start in range(0, len(line), _LINE_CHARACTERS)
        ]
        drawn = np.random.default_rng(derive_key("tokenizer", seed, number)).random(len(found))
        chosen = np.flatnonzero(drawn <= highest)
        lines.extend(found[i] for i in chosen)
        priorities.extend(drawn[chosen].tolist())
        if len(lines) > 2 * count:
            lines, priorities = _lowest(lines, priorities, count)
            highest = max(priorities)
    return _lowest(lines, priorities, count)[0] if len(lines) > count else lines


def _lowest(lines: list[str], priorities: list[float], count: int) -> tuple[list[str], list[float]]:
    kept = np.sort(np.argpartition(np.array(priorities), count)[:count])
    return [lines[i] for i in kept], [priorities[i] for i in kept]


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
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.model, dtype)) as pool:
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


def _start_worker(model: bytes, dtype: type[np.integer]) -> None:
    global _worker
    _worker = (Tokenizer(model), dtype)
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
