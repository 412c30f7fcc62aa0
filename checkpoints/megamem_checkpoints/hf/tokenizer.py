"""The tokenizer of a run as the files that ``AutoTokenizer`` opens, with the same ids.

That of an imported model is copied as it came; where transformers would build another one from its pieces than its
``tokenizer.json`` says (``LlamaTokenizer`` does), the export's ``tokenizer_config.json`` names the class that reads that file.
For a sentencepiece model, transformers builds a fast tokenizer from its pieces and merges, without the prefix space that some
models put before a text, and turns text that looks like a special token into that token; both are put right here. What it cannot
reproduce (Viterbi ties of unigram models, normalisation rules) shows in :func:`check_ids`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamem.errors import ExportError
from megamem.files import TOKENIZER_FILES

SAMPLE = (
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    " leading, trailing and  double   spaces ",
    "\n\n\tdef f(x):\r\n\t    return x[0] ** 2  # comment\n",
    "</s> <s> <unk> <pad> <0x0A> are plain text",
    "Zürich, São Paulo, naïve café, cafe\u0301, ﬁne, ½, …",
    "日本語のテキスト, 한국어, русский, العربية, हिन्दी",
    "emoji 😀 👩‍👩‍👧 🇨🇭, a no-break\u00a0space, a zero\u200bwidth space, a lower one eighth ▁ block",
    "1234567890 3.14159 1e-8 0xdeadbeef {}[]()<>!@#$%^&*;:'\"\\|/?~`",
    "control characters \x00 \x07 \x1b end",
)
"""Texts on which tokenizers like to differ."""

_REPLACE = (
    "import the model with the tokenizer files that AutoTokenizer.from_pretrained(...).save_pretrained(...) writes, and prepare "
    "data with them"
)


def find_tokenizer(config: Mapping[str, Any], data: Path | None = None) -> Path:
    """The file that decides about a run's token ids: in its prepared data (``data``: where that is now), or, for a run without
    data, what ``data.tokenizer.model`` names."""
    path = str(data) if data is not None else config["data"]["path"]
    if not path:
        return Path(config["data"]["tokenizer"]["model"])
    present = [Path(path) / name for name in TOKENIZER_FILES if (Path(path) / name).is_file()]
    return present[0] if present else Path(path) / "tokenizer.model"


def export_tokenizer(model: Path, folder: Path, *, max_length: int) -> None:
    """Write the files of the tokenizer ``model`` into ``folder``; :func:`check_export` completes them.

    ``max_length`` is the length of the sequences that the language model was trained on. ExportError where ``model`` is
    neither a ``tokenizer.json`` nor a sentencepiece model. Call it before ``folder`` has a configuration with remote code:
    transformers asks about it.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from tokenizers import decoders, normalizers
    from transformers import AutoTokenizer

    if model.suffix == ".json":
        for name in TOKENIZER_FILES:
            if model.with_name(name).is_file():
                shutil.copyfile(model.with_name(name), folder / name)
        return
    try:
        content = model.read_bytes()
        processor = SentencePieceProcessor(model_proto=content)
        end = processor.id_to_piece(processor.eos_id())
    except (OSError, RuntimeError, IndexError) as error:
        raise ExportError(
            f"{model} is no sentencepiece model with an end-of-document entry ({error}); name the tokenizer of the run"
        ) from None
    shutil.copyfile(model, folder / "tokenizer.model")
    tokenizer = AutoTokenizer.from_pretrained(
        folder,
        split_special_tokens=True,
        eos_token=end,
        pad_token=end,
        padding_side="left",  # a batch is generated from its last position
        model_max_length=max_length,
    )
    backend = tokenizer.backend_tokenizer
    if sentencepiece_model_pb2.ModelProto.FromString(content).normalizer_spec.add_dummy_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), backend.normalizer])
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    tokenizer.save_pretrained(folder)
    # Where transformers read it: a copy of the export may be read elsewhere.
    _edit(folder / "tokenizer_config.json", remove=("is_local", "local_files_only", "name_or_path"))


def check_export(folder: Path, config: Any, model: Path, sample: Sequence[str] = ()) -> int:
    """Check what ``AutoTokenizer`` opens in ``folder``, which :func:`export_tokenizer` filled and where ``config``, a
    ``PretrainedConfig``, is saved: transformers takes both into account when it chooses a class.

    For a ``tokenizer.json`` that its class does not reproduce, ``tokenizer_config.json`` is made to name the one that does.
    Returns the number of texts compared; ExportError on the first mismatch, see :func:`check_ids`.
    """
    if model.suffix == ".json" and not _opens_as(folder, config, model, sample):
        _edit(
            folder / "tokenizer_config.json",
            remove=("auto_map", "tokenizer_file"),
            tokenizer_class="PreTrainedTokenizerFast",
        )
    return check_ids(_open(folder, config), model, sample)


def check_import(model: Path, config: Any) -> None:
    """ExportError unless the tokenizer ``model`` of an imported model can be exported beside its ``config``."""
    with tempfile.TemporaryDirectory(prefix="megamem-tokenizer-") as scratch:
        folder = Path(scratch)
        export_tokenizer(model, folder, max_length=config.max_position_embeddings)
        config.save_pretrained(folder)
        check_export(folder, config, model)


def _open(folder: Path, config: Any) -> Any:
    """The tokenizer of an export, as the class that ``config`` leads to; runs no code of the directory."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # transformers' tokenizers have errors of their own, without a common base
        raise ExportError(
            f"AutoTokenizer does not open the tokenizer of the run ({type(error).__name__}: {error}); {_REPLACE}"
        ) from error


def _opens_as(folder: Path, config: Any, model: Path, sample: Sequence[str]) -> bool:
    try:
        return check_ids(_open(folder, config), model, sample) > 0
    except ExportError:
        return False


def check_ids(tokenizer: Any, model: Path, sample: Sequence[str]) -> int:
    """Compare ids on :data:`SAMPLE` and ``sample`` with those that the run was trained on, and for sentencepiece the decoded
    text too.

    Returns the number of texts compared; ExportError on the first mismatch.
    """
    texts = [*SAMPLE, *sample]
    if model.suffix == ".json":
        return _check_hugging_face_ids(tokenizer, model, texts)
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    for text in texts:
        ours = processor.encode(text)
        theirs = tokenizer.encode(text, verbose=False)
        if ours != theirs or tokenizer.decode(ours) != processor.decode(ours):
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise ExportError(
                f"Hugging Face's tokenizer of {model} differs from sentencepiece on {text[:40]!r} (token {first}: "
                f"{theirs[first : first + 4]} in place of {ours[first : first + 4]}); set data.tokenizer.type to bpe, "
                "with the identity normalisation, and train again"
            )
    if len(tokenizer) != processor.vocab_size():
        raise ExportError(
            f"Hugging Face's tokenizer of {model} has {len(tokenizer)} entries in place of {processor.vocab_size()}; "
            "set data.tokenizer.type to bpe and train again"
        )
    return len(texts)


def _check_hugging_face_ids(tokenizer: Any, model: Path, texts: Sequence[str]) -> int:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(model))
    backend.encode_special_tokens = True
    for text in texts:
        ours = backend.encode(text, add_special_tokens=False).ids
        theirs = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        if ours != theirs:
            raise ExportError(
                f"AutoTokenizer does not give the ids of {model} for {text[:40]!r}, as no class of transformers; {_REPLACE}"
            )
    return len(texts)


def _edit(config: Path, *, remove: Sequence[str], **changes: str) -> None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in remove} | changes
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
