"""The ``data`` section: corpus, tokenizer, clusters, sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megamem.config import at_least
from megamem.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One corpus of ``data.sources``."""

    kind: Literal["folder", "jsonl", "datasets", "python_stdlib"] = "folder"
    """``folder``: one document per file. ``jsonl``: one per line. ``datasets``: anything ``datasets.load_dataset``
    opens. ``python_stdlib``: the sources of the interpreter's standard library without its tests, which every machine has."""
    path: str = ""
    """Folder, file, glob of files, or name of the dataset; unused by ``python_stdlib``."""
    pattern: str = "**/*"
    """Files of a ``folder`` source."""
    text_field: str = "text"
    """Key of the text in ``jsonl`` and ``datasets``."""
    split: str = "train"
    """Split of a ``datasets`` source."""
    options: dict[str, str] = field(default_factory=dict)
    """Further arguments of ``datasets.load_dataset``, such as ``name`` or ``data_files``."""
    max_documents: int = 0
    """Take only so many documents; 0 for all."""

    def __post_init__(self) -> None:
        if not self.path and self.kind != "python_stdlib":
            raise ConfigError(f"path is empty; set the folder, file or dataset that this {self.kind} source reads")
        if self.kind == "folder" and (not self.pattern or self.pattern.startswith("/")):
            raise ConfigError(f"pattern is {self.pattern!r}; set a glob below path, such as **/*.txt")
        if self.max_documents < 0:
            raise ConfigError(f"max_documents is {self.max_documents}; set a number of documents, or 0 for all")


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """``data.tokenizer``: an existing tokenizer, or how to train one on the sources."""

    model: str = ""
    """Path of an existing sentencepiece ``.model``, or of the folder of a Hugging Face model's ``tokenizer.json``; empty trains
    a sentencepiece model."""
    type: Literal["bpe", "unigram"] = "bpe"
    """``bpe`` exports to Hugging Face with identical ids; ``unigram`` is verified at export and refused on a
    mismatch."""
    vocab_size: int = 8192
    """Entries of a tokenizer that is trained; an existing model brings its own number."""
    train_lines: int = 400_000
    """Lines sampled to train it."""

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "train_lines")
        if self.vocab_size >= 2**31:
            raise ConfigError(f"vocab_size is {self.vocab_size}; token ids have 31 bits, set less than {2**31}")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """``data``: what ``megamem data prepare`` reads and writes, and how sequences are cut from it."""

    path: str = ""
    """Directory of prepared data, written by ``megamem data prepare`` and read by ``megamem train``."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Corpora, in order; each has kind, path, pattern, text_field, split, options and max_documents."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    seq_length: int = 512
    """Tokens per sequence."""
    validation_fraction: float = 0.02
    """Share of documents held out, chosen by a hash of the document's number."""
    shard_tokens: int = 16_000_000
    """Tokens per shard file."""
    cluster_dimensions: int = 64
    """Width of the document embeddings that are clustered into the bank's tree; a sentence encoder brings its own
    width."""
    encoder: str = ""
    """Sentence encoder (a name or folder that ``sentence_transformers`` loads) that embeds documents in place of
    TF-IDF over the tokenizer's own ids; needs the package ``sentence-transformers``."""
    workers: int = 0
    """Processes of ``megamem data prepare``; 0 takes one per core."""

    def __post_init__(self) -> None:
        if self.seq_length < 2:
            raise ConfigError(f"seq_length is {self.seq_length}; set at least 2")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}; set a value from 0 up to 1")
        at_least(self, 1, "shard_tokens", "cluster_dimensions")
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; set a number of processes, or 0 for one per core")
