"""The tokenizer of a Hugging Face model as the tokenizer of prepared data: the same ids, and text that is only text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megamem.errors import DataError
from megamem.memory.folding import fold_from_tokenizer, folded_vocab_size
from megamem_data import encoding
from megamem_data.config import DataConfig, SourceConfig, TokenizerConfig
from megamem_data.prepare import prepare
from megamem_data.prepared import PreparedData
from megamem_data.tokenizer import HuggingFaceTokenizer, open_tokenizer

TEXTS = [
    "The quick brown Fox jumps over the fox.",
    "  def f(x):\n\treturn x ** 2\r\n",
    "a <|end|> that is text, and <|begin|> too",
    "Zürich, naïve café, 日本語, 👩‍👩‍👧, \x00",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE whose template adds a token in front, as those of Llama 3 do."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": {"__type": "AddedToken", "content": "<|end|>"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"no tokenizer file")
    return folder


def test_ids_are_those_of_auto_tokenizer(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    end = reference.convert_tokens_to_ids("<|end|>")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (len(reference), end)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False, split_special_tokens=True, truncation=False)
        assert end not in ids
        assert tokenizer.decode(np.array([*ids, end])) == text
    assert open_tokenizer(folder / "tokenizer.json").sha256 == tokenizer.sha256
    assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert tokenizer.piece(end) == "<|end|>"


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_are_encoded_in_processes(folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1000)
    tokenizer = open_tokenizer(folder)
    documents = ["fox " * 300, TEXTS[0], "brown " * 200]
    encoded = list(encoding.encode_documents(documents, tokenizer, dtype=np.uint16, workers=workers))
    assert len(encoded) == 2
    tokens = np.concatenate([ids for ids, _ in encoded])
    expected = [np.array([*tokenizer.encode(text), tokenizer.eos_id]) for text in documents]
    assert np.array_equal(tokens, np.concatenate(expected))


def test_prepared_data_keeps_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(TEXTS[:4] * 3):
        (corpus / f"{number:02d}.txt").write_text(f"{number} {text}", encoding="utf-8", newline="")
    config = DataConfig(
        path=str(tmp_path / "data"),
        sources=[SourceConfig(path=str(corpus))],
        tokenizer=TokenizerConfig(model=str(folder)),
        validation_fraction=0.2,
        cluster_dimensions=4,
        workers=1,
    )
    data = prepare(config, branching=2, levels=1, seed=3, progress=False)
    assert isinstance(data.tokenizer, HuggingFaceTokenizer)
    assert data.tokenizer_model == tmp_path / "data" / "tokenizer.json"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "data" / name).read_bytes() == (folder / name).read_bytes()
    first = data.shards[0].tokens[: data.lengths[0]]
    assert first[-1] == data.eos_id and data.tokenizer.decode(first) == f"0 {TEXTS[0]}"
    assert data.clusters is not None and len(data.clusters.assign(first)) == 1
    assert prepare(config, branching=2, levels=1, seed=3, progress=False).fingerprint == data.fingerprint
    settings = tmp_path / "data" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("end", "begin"), encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config\.json has"):
        PreparedData.open(tmp_path / "data")


def test_another_end_of_document_is_another_request(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|begin|>"}', encoding="utf-8")
    one, two = open_tokenizer(folder), open_tokenizer(other)
    assert one.sha256 == two.sha256 and one.fingerprint != two.fingerprint and one.eos_id != two.eos_id


def test_folding_reads_the_same_file(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    fold = fold_from_tokenizer(folder / "tokenizer.json", vocab_size=tokenizer.vocab_size + 3)
    assert fold.shape == (tokenizer.vocab_size + 3,) and fold.dtype == np.int64
    upper, lower = (tokenizer.encode(letter)[0] for letter in "Ff")
    assert fold[upper] == fold[lower] != fold[tokenizer.encode("x")[0]]
    alone = [tokenizer.eos_id, *range(tokenizer.vocab_size, tokenizer.vocab_size + 3)]
    assert all((fold == fold[token]).sum() == 1 for token in alone)
    assert set(fold.tolist()) == set(range(folded_vocab_size(fold)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{}", "says of no token that it ends a document"),
        ("[", "says of no token that it ends a document"),
        ('{"eos_token": "<|stop|>"}', r"eos_token '<\|stop\|>' of tokenizer_config\.json is not in tokenizer\.json"),
    ],
)
def test_without_an_end_of_document_it_is_refused(folder: Path, settings: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        open_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"data\.tokenizer\.model cannot be read"):
        open_tokenizer(tmp_path / "none")
