"""Training of a sentencepiece tokenizer on the corpus.

A trained model has no ``<s>`` and no padding entry: id 0 is ``<unk>`` (never produced, bytes stand for unknown
characters), id 1 is ``</s>``, which ends every document; ids 2 to 257 are the bytes. Text is taken as it is (identity
normalisation, white space kept, no prefix space), digits are single pieces and runs of spaces may be one piece. With
these settings and type ``bpe``, Hugging Face's ``AutoTokenizer`` gives the same ids on a folder that holds the file
as ``tokenizer.model`` when it is called with ``split_special_tokens=True``; a prefix space would break that.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import numpy as np
import sentencepiece

from megamem.errors import DataError
from megamem_data.config import TokenizerConfig
from megamem_data.order import derive_key
from megamem_data.tokenizer import SentencePieceTokenizer

_LINE_CHARACTERS = 4096  # of the training sample; sentencepiece drops longer lines, so they are cut


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig, *, seed: int) -> SentencePieceTokenizer:
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
    return SentencePieceTokenizer(model.getvalue())


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
