"""Token folding: the normaliser chain, its awkward tokens, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megamem.errors import DataError
from megamem.memory.folding import fold_from_sentencepiece, fold_table, folded_vocab_size


def folds(*texts: str) -> list[int]:
    return fold_table((text, f"piece-{i}") for i, text in enumerate(texts)).tolist()


def test_equivalent_texts_share_an_id() -> None:
    assert folds("the", " the", "The", "THE", "thé", "the\u0301", "\uff34\uff28\uff25", "then") == [
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
    ]


def test_white_space_variants_fold_to_one_space() -> None:
    assert folds(" ", "\n", "\t\t", " \r\n ", "\u00a0", "a  b", "a\n\tb") == [0, 0, 0, 0, 0, 1, 1]


def test_the_empty_token_is_not_a_space() -> None:
    assert folds("", " ", "") == [0, 1, 0]


def test_text_that_normalises_to_nothing_keeps_its_own_text() -> None:
    assert folds("\u0301", "\u0300", "\u0301") == [0, 1, 0]  # lone accents are stripped away


def test_partial_utf8_is_told_apart_by_its_piece() -> None:
    fold = fold_table([("\ufffd", "<0xC3>"), ("\ufffd", "<0xE2>"), ("a\ufffd", "a<0xC3>"), ("A", "A"), ("a", "a")])
    assert fold.tolist() == [0, 1, 2, 3, 3]
    assert fold.dtype == np.int64
    assert folded_vocab_size(fold) == 4


def test_ids_are_numbered_by_first_appearance() -> None:
    assert folds("b", "a", "B", "c", "A") == [0, 1, 0, 2, 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["the", "The", "cafe", "café", "tree", "TREE", "and", "And"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i % 8 :] + words[: i % 8]) for i in range(200)]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_sentencepiece_model(model: Path) -> None:
    fold = fold_from_sentencepiece(model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    assert fold.shape == (processor.vocab_size(),)
    assert sorted(set(fold.tolist())) == list(range(folded_vocab_size(fold)))
    assert folded_vocab_size(fold) < len(fold)
    assert fold[ids["<0x41>"]] == fold[ids["<0x61>"]]  # the bytes of "A" and "a"
    assert fold[ids["<0x0A>"]] == fold[ids["<0x20>"]] == fold[ids["▁"]]
    partial = [fold[ids[f"<0x{byte:02X}>"]] for byte in range(0x80, 0x100)]
    assert len(set(partial)) == 128
    assert len({int(fold[ids[piece]]) for piece in ("<unk>", "<s>", "</s>")}) == 3
    whole = [i for piece, i in ids.items() if piece.replace("▁", "").lower() == "the"]
    assert len(whole) > 1
    assert len({int(fold[i]) for i in whole}) == 1


def test_missing_and_broken_models_are_data_errors(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(b"not a model")
    for path in (tmp_path / "absent.model", broken):
        with pytest.raises(DataError, match=path.name):
            fold_from_sentencepiece(path)
