"""Folding of tokens whose text is equivalent onto one canonical id (arXiv 2601.07372, section 2.2).

The lookup is built once from a tokenizer, over ids in ascending order, so it is a pure function of the tokenizer model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tokenizers import Regex, normalizers

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


def save_fold(path: str | Path, fold: np.ndarray) -> None:
    """Write a lookup as safetensors with its checksum; the file appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(save({"fold": fold}, metadata={"sha256": fold_digest(fold)}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_fold(path: str | Path) -> np.ndarray:
    """The lookup that :func:`save_fold` wrote, ``[vocab_size]`` int64; DataError where it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            fold = file.get_tensor("fold")
            recorded = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as a fold table ({error}); prepare the data again") from error
    if fold.dtype != np.int64 or fold.ndim != 1 or fold_digest(fold) != recorded:
        raise DataError(f"{path} is damaged: its checksum does not match its content; prepare the data again")
    return fold


def fold_digest(fold: np.ndarray) -> str:
    """SHA-256 of a lookup: two runs with the same digest hash the same n-grams."""
    return hashlib.sha256(np.ascontiguousarray(fold, dtype="<i8").tobytes()).hexdigest()


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
