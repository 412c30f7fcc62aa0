"""Tokenizer files of an export: the ids of sentencepiece, or a refusal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megamem.errors import ExportError
from megamem.testing.pretrained import VOCABULARY, config_of, write_tokenizer
from megamem_checkpoints.hf.remote_code.configuration_megamem import MegamemConfig
from megamem_checkpoints.hf.tokenizer import SAMPLE, check_export, check_ids, check_import, export_tokenizer
from megamem_data.tokenizer import open_tokenizer

TEXT = Path(json.__file__).read_text(encoding="utf-8") + Path(json.decoder.__file__).read_text(encoding="utf-8")


def train(path: Path, **changes: object) -> Path:
    model = io.BytesIO()
    settings: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "unk_id": 0,
        "eos_id": 1,
        "bos_id": -1,
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, **(settings | changes)
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("prefix", [False, True])
def test_bpe_ids_are_those_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    model = train(tmp_path / "some.model", add_dummy_prefix=prefix)
    folder = tmp_path / "export"
    folder.mkdir()
    export_tokenizer(model, folder, max_length=128)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert check_ids(tokenizer, model, [TEXT, *TEXT.splitlines()[:50]]) == len(SAMPLE) + 51
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1
    config = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in config and "local" not in config
    (folder / "tokenizer.model").unlink()  # tokenizer.json alone is enough
    again = AutoTokenizer.from_pretrained(folder)
    assert again.encode("</s> x") == sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("</s> x")
    assert again(["a b", "a"], padding=True, padding_side="left")["input_ids"][1][0] == 1


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    model = train(tmp_path / "some.model", model_type="unigram")
    export_tokenizer(model, tmp_path, max_length=128)
    with pytest.raises(ExportError, match=r"differs from sentencepiece.*data\.tokenizer\.type to bpe"):
        check_ids(AutoTokenizer.from_pretrained(tmp_path), model, [TEXT])


def test_a_normalising_model_is_refused(tmp_path: Path) -> None:
    model = train(tmp_path / "some.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    export_tokenizer(model, tmp_path, max_length=128)
    with pytest.raises(ExportError, match="differs from sentencepiece"):
        check_ids(AutoTokenizer.from_pretrained(tmp_path), model, [])


@pytest.mark.parametrize("family", ["llama", "mixtral", "megamem"])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_class_that_does_not_read_tokenizer_json_is_replaced(family: str, kind: str, tmp_path: Path) -> None:
    origin, folder = tmp_path / "origin", tmp_path / "export"
    origin.mkdir()
    folder.mkdir()
    write_tokenizer(origin, kind)
    config = MegamemConfig(vocab_size=VOCABULARY) if family == "megamem" else config_of(family)
    config.save_pretrained(folder)
    export_tokenizer(origin / "tokenizer.json", folder, max_length=128)
    assert check_export(folder, config, origin / "tokenizer.json", ["the  text"]) == len(SAMPLE) + 1
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    expected = json.loads((origin / "tokenizer_config.json").read_text(encoding="utf-8"))
    replaced = kind == "metaspace" and family != "mixtral"  # for Mixtral, transformers itself mistrusts the class
    assert settings == expected | ({"tokenizer_class": "PreTrainedTokenizerFast"} if replaced else {})
    assert (folder / "tokenizer.json").read_bytes() == (origin / "tokenizer.json").read_bytes()
    ours, theirs = open_tokenizer(origin), AutoTokenizer.from_pretrained(folder, config=config)
    for text in SAMPLE:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == ours.encode(text), text
    front = [1] if kind == "metaspace" else []
    assert theirs.encode("the")[: len(front)] == front and theirs.eos_token_id == ours.eos_id


def test_a_tokenizer_that_no_class_reproduces_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["added_tokens_decoder"] = {"260": {"content": "quick"}}  # which tokenizer.json does not know
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ExportError, match=r"does not give the ids of .*tokenizer\.json for 'The quick"):
        check_import(tmp_path / "tokenizer.json", config_of("llama"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 3}', encoding="utf-8")
    with pytest.raises(ExportError, match="AutoTokenizer does not open the tokenizer of the run"):
        check_import(tmp_path / "tokenizer.json", config_of("llama"))


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes | None) -> None:
    model = tmp_path / "some.model"
    if content is not None:
        model.write_bytes(content)
    with pytest.raises(ExportError, match=r"some\.model is no sentencepiece model"):
        export_tokenizer(model, tmp_path, max_length=128)
