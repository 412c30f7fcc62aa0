"""Tokenizer: the same ids as sentencepiece and Hugging Face, encoding by line and in processes, clear limits."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import sentencepiece

from megamem.errors import DataError
from megamem_data.config import SourceConfig, TokenizerConfig
from megamem_data.encoding import encode_documents
from megamem_data.sources import SourceCounts, read_documents
from megamem_data.tokenizer import SentencePieceTokenizer
from megamem_data.tokenizer_training import sample_lines, train_tokenizer

AWKWARD = [
    "",
    "\n",
    "a",
    " a",
    "\n\n  two  leading\n\ttab  trail  ",
    "</s> <s> <unk>",
    "é\u0301\u3000全角 🙂",
    "\r\n x\x00y",
    "▁x ▁",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(
        read_documents([SourceConfig(kind="python_stdlib", max_documents=40)], strict=False, counts=SourceCounts())
    )


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> SentencePieceTokenizer:
    return train_tokenizer(texts, TokenizerConfig(vocab_size=1024, train_lines=5000), seed=1)


def test_ids_are_those_of_sentencepiece_and_of_hugging_face(
    tokenizer: SentencePieceTokenizer, texts: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    for text in [*texts[:10], *AWKWARD]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert 0 not in ids and tokenizer.eos_id not in ids
        if "▁" not in text:  # sentencepiece's own mark of a space
            assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.eos_id, theirs.eos_token_id, theirs.bos_token_id) == (1024, 1, 1, None)


def test_training_is_deterministic_and_depends_on_the_seed_of_the_sample(texts: list[str]) -> None:
    config = TokenizerConfig(vocab_size=600, train_lines=500)
    assert train_tokenizer(texts, config, seed=1).sha256 == train_tokenizer(texts, config, seed=1).sha256
    assert train_tokenizer(texts, config, seed=1).sha256 != train_tokenizer(texts, config, seed=2).sha256


def test_line_sample_is_uniform_bounded_and_in_order() -> None:
    documents = ["\n".join(f"{document:03d} {line:02d}" for line in range(20)) + "\n\n" for document in range(100)]
    sample = sample_lines(documents, 400, seed=3)
    assert len(sample) == 400 and sample == sorted(sample) and len(set(sample)) == 400
    early = sum(line < "050" for line in sample)
    assert 160 < early < 240
    assert len(sample_lines(documents, 10_000, seed=3)) == 2000
    assert sample_lines(["x" * 10_000], 5, seed=0) == ["x" * 4096, "x" * 4096, "x" * 1808]


def test_a_model_with_a_prefix_space_encodes_whole_texts() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(json.__file__).read_text().splitlines()),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "two lines\nof text"
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.encode(text) != [i for line in text.splitlines(True) for i in reference.encode(line)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_text_gets_the_ids_of_sentencepiece(kind: Literal["bpe", "unigram"], texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts[:10], TokenizerConfig(type=kind, vocab_size=700), seed=1)
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    parts = [" ", "  ", "\n", "\r", "\t", "\x0b", "\x85", "\x00", "\u2028", "\u2581", "a", "def ", "é", "日", "</s>"]
    rng = np.random.default_rng(0)
    for _ in range(1000):
        text = "".join(rng.choice(parts, rng.integers(0, 40)))
        assert tokenizer.encode(text) == reference.encode(text), text


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_are_encoded_in_order_and_closed(
    tokenizer: SentencePieceTokenizer, texts: list[str], workers: int
) -> None:
    many = texts * 3  # enough for several batches
    blocks = list(encode_documents(iter(many), tokenizer, dtype=np.uint16, workers=workers))
    assert len(blocks) > 1
    tokens = np.concatenate([block[0] for block in blocks])
    lengths = np.concatenate([block[1] for block in blocks])
    assert tokens.dtype == np.uint16 and len(lengths) == len(many)
    for ids, text in zip(np.split(tokens, np.cumsum(lengths)[:-1]), many, strict=True):
        assert ids.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]


def test_workers_end_when_their_parent_is_killed(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"])
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    parent = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # nobody may reap it
    except (FileNotFoundError, ProcessLookupError):
        return False


ENDLESS = """
import itertools, multiprocessing, pathlib, sys
import numpy as np
from megamem_data.encoding import encode_documents
from megamem_data.tokenizer import SentencePieceTokenizer
if __name__ == "__main__":
    tokenizer = SentencePieceTokenizer((pathlib.Path(sys.argv[1]) / "tokenizer.model").read_bytes())
    for _ in encode_documents(itertools.repeat("some words " * 100_000), tokenizer, dtype=np.uint16, workers=2):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        (["abc def\n" * 30], 100, r"vocab_size=100 is too small for 256 bytes, .* set it to at least 26\d"),
        (["abc def\n" * 30], 8192, r"vocab_size=8192 is more than this corpus supports; lower it to at most 27\d"),
        ([], 300, "hold no text"),
        (["\n \n"], 300, "hold no text"),
    ],
)
def test_sizes_that_do_not_fit_name_the_number_to_set(documents: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(documents, TokenizerConfig(vocab_size=vocab_size), seed=0)


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_something_else_than_a_model_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match=r"some\.model .*set data\.tokenizer\.model"):
        SentencePieceTokenizer(content, "some.model")
