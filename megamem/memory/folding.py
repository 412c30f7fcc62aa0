"""Folding of tokens whose text is equivalent onto one canonical id (arXiv 2601.07372, section 2.2).

The lookup is built once from a tokenizer, over ids in ascending order, so it is a pure function of the tokenizer model.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from megamem.errors import DataError

_LONE_SPACE = "\ue000"  # private use: keeps a token that is one space apart from one that is empty
_REPLACEMENT = "\ufffd"


def fold_table(tokens: Iterable[tuple[str, str]]) -> np.ndarray:
    """Canonical id of every token id, numbered in the order of first appearance.

    Args:
        tokens: for every id in ascending order its decoded text and its raw vocabulary string. The raw string is the
            key of tokens whose text is not whole UTF-8, which decodes to U+FFFD.

    Returns:
        ``[vocab_size]`` int64.
    """
    canonical: dict[str, int] = {}
    return np.array([canonical.setdefault(_key(*token), len(canonical)) for token in tokens], dtype=np.int64)


def folded_vocab_size(fold: np.ndarray) -> int:
    """Number of canonical ids of a lookup."""
    return int(fold.max()) + 1


def fold_from_tokenizer(path: Path, *, vocab_size: int) -> np.ndarray:
    """:func:`fold_table` of a sentencepiece model or of a Hugging Face ``tokenizer.json``; DataError where it is neither.

    ``vocab_size`` is the model's; ids that the tokenizer does not have stand for themselves.
    """
    fold = _fold_from_hugging_face(path) if path.suffix == ".json" else fold_from_sentencepiece(path)
    own = np.arange(max(0, vocab_size - len(fold)), dtype=np.int64)
    return np.concatenate([fold, folded_vocab_size(fold) + own])


def _fold_from_hugging_face(path: Path) -> np.ndarray:
    """Special tokens stand for themselves, as do ids that no token has."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        raise DataError(f"{path} cannot be read as a tokenizer ({error}); prepare the data again") from error
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}

    def describe(token: int) -> tuple[str, str]:
        piece = tokenizer.id_to_token(token)
        if piece is None:
            return "\ufffd", f"{_LONE_SPACE}{token}"
        return (piece if token in special else tokenizer.decode([token], skip_special_tokens=False)), piece

    return fold_table(describe(token) for token in range(1 + max(tokenizer.get_vocab().values())))


def fold_from_sentencepiece(model_path: str | Path) -> np.ndarray:
    """:func:`fold_table` of a sentencepiece model; DataError where the file is missing or not a model.

    Control tokens and the unknown token stand for themselves: sentencepiece would decode them to nothing, or to a sign.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(model_path))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{model_path} cannot be read as a sentencepiece model ({error}); prepare the data again"
        ) from error
    return fold_table((_text(model, i), model.id_to_piece(i)) for i in range(model.vocab_size()))


@cache
def _normalizer() -> normalizers.Sequence:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(left=True, right=True),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )


def _key(text: str, piece: str) -> str:
    if _REPLACEMENT in text:
        return piece
    return _normalizer().normalize_str(text) or text


def _text(model: object, token: int) -> str:
    if model.is_control(token) or model.is_unknown(token):  # type: ignore[attr-defined]
        return model.id_to_piece(token)  # type: ignore[attr-defined]
    return model.decode([token])  # type: ignore[attr-defined]
