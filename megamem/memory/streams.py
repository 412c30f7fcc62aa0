"""Streams: sources of row ids that are known from the data of a micro-batch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megamem.batch import MicroBatch
from megamem.errors import ConfigError, DataError
from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.memory.folding import folded_vocab_size
from megamem.memory.hashing import HashSpec, hash_specs
from megamem.memory.names import bank_stream_name, bank_table_name, engram_stream_name, engram_table_name
from megamem.memory.spec import InitSegment, TableSpec
from megamem.models.config import ModelConfig
from megamem_kernels.ngram_hash import ngram_hash


class Stream(Protocol):
    """A source of addresses, shared by one or more tables with equally many rows."""

    name: str
    rows: int
    """Size of the id space."""
    tables: tuple[TableSpec, ...]

    def addresses(self, micro: MicroBatch, positions: slice, *, train: bool = True) -> np.ndarray:
        """Row ids that the tokens at ``positions`` of every sequence read.

        ``[b, len(positions), k]`` int64 in ``[0, rows)``. A pure function of tokens, documents and sample ids, so the
        same for a sequence under every layout and in every micro-batch.
        """
        ...


class EngramStream:
    """Hashed suffix n-grams of one layer; ``k = len(orders) * heads``, all heads of order 2 first."""

    def __init__(self, config: EngramConfig, spec: HashSpec, *, fold: np.ndarray | None, pad_id: int) -> None:
        """``pad_id`` is a token id, folded like one; ``fold`` is ``[vocab_size]`` int64, or None to hash token ids."""
        self.name = engram_stream_name(spec.layer)
        self.rows = spec.rows
        init = (InitSegment(config.width, config.init_std),)
        self.tables: tuple[TableSpec, ...] = (TableSpec(engram_table_name(spec.layer), spec.rows, config.width, init),)
        self._spec = spec
        self._fold = fold
        self._pad_id = pad_id if fold is None else int(fold[pad_id])
        self._reach = max(config.orders) - 1

    def addresses(self, micro: MicroBatch, positions: slice, *, train: bool = True) -> np.ndarray:
        """See :class:`Stream`; the same in training and evaluation."""
        left = max(0, positions.start - self._reach)
        window = slice(left, positions.stop)
        tokens = micro.tokens[:, window]
        return ngram_hash(
            tokens if self._fold is None else self._fold[tokens],
            micro.document_ids[:, window],
            multipliers=self._spec.multipliers,
            primes=self._spec.primes,
            offsets=self._spec.offsets,
            pad_id=self._pad_id,
            context=positions.start - left,
        )


class BankStream:
    """Blocks of one level of the cluster tree; ``k = 1``, and every token of a document reads the same block.

    In training, a document reads the generic block (the last row) in place of its own with probability
    ``generic_probability``, at all levels or at none (arXiv 2510.02375, appendix A).
    """

    def __init__(self, config: BankConfig, level: int, *, layers: Sequence[int], hidden_size: int, seed: int) -> None:
        """``level`` counts from 1; ``layers`` are those of the pipeline stage that have a bank."""
        self.name = bank_stream_name(level)
        self.rows = config.branching**level + 1
        inner = config.units[level - 1] * hidden_size
        init = (InitSegment(2 * inner, config.init_std, truncated=True), InitSegment(inner, 0.0))
        self.tables: tuple[TableSpec, ...] = tuple(
            TableSpec(bank_table_name(layer, level), self.rows, 3 * inner, init) for layer in layers
        )
        self._config = config
        self._level = level
        self._seed = seed

    def addresses(self, micro: MicroBatch, positions: slice, *, train: bool = True) -> np.ndarray:
        """See :class:`Stream`; DataError where the data has no clusters for this level of the tree."""
        generic = self.rows - 1
        levels = micro.document_paths.shape[1]
        if levels < self._level:
            raise DataError(
                f"the prepared data has {levels} cluster levels but memory.bank.units needs {self._level}; run "
                "`megamem data prepare` with this memory.bank into another data.path"
            )
        blocks = micro.document_paths[:, self._level - 1]
        wrong = blocks[(blocks < 0) | (blocks >= generic)]
        if wrong.size:
            raise DataError(
                f"the prepared data names cluster {wrong[0]} at level {self._level}, where memory.bank.branching="
                f"{self._config.branching} allows {generic}; run `megamem data prepare` with this memory.bank into "
                "another data.path"
            )
        if train:
            blocks = np.where(self._is_generic(micro), generic, blocks)
        return blocks[micro.document_ids[:, positions]][..., None]

    def _is_generic(self, micro: MicroBatch) -> np.ndarray:
        """``[documents]`` bool, drawn from (seed, sample, index of the document within its sequence)."""
        first = micro.document_ids[:, 0]
        documents = np.arange(len(micro.document_paths))
        sequence = np.searchsorted(first, documents, side="right") - 1
        keys = zip(micro.sample_ids[sequence].tolist(), (documents - first[sequence]).tolist(), strict=True)
        return np.array([_uniform(self._seed, *key) < self._config.generic_probability for key in keys], dtype=bool)


def _uniform(seed: int, sample: int, document: int) -> float:
    """A draw from [0, 1)."""
    digest = hashlib.blake2b(f"generic-memory:{seed}:{sample}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


def build_streams(
    model: ModelConfig, memory: MemoryConfig, *, layers: Sequence[int], eos_id: int, fold: np.ndarray | None, seed: int
) -> list[Stream]:
    """Streams of one pipeline stage, in the order of their layers and levels: the same list on all its ranks.

    Args:
        model: ``vocab_size`` must be set.
        layers: zero-based layers of this stage.
        eos_id: end-of-document token, which stands for missing context unless ``memory.engram.pad_id`` names another.
        fold: ``[vocab_size]`` int64 lookup of canonical ids (:mod:`megamem.memory.folding`); required by
            ``memory.engram.fold_tokens`` and ignored without it.
        seed: of the generic-memory draw.

    Raises:
        ConfigError: the pad token is not in the vocabulary.
    """
    return [
        *_engram_streams(model, memory.engram, layers=layers, eos_id=eos_id, fold=fold),
        *_bank_streams(model, memory.bank, layers=layers, seed=seed),
    ]


def _engram_streams(
    model: ModelConfig, config: EngramConfig, *, layers: Sequence[int], eos_id: int, fold: np.ndarray | None
) -> list[Stream]:
    if not config.layers:
        return []
    pad_id = eos_id if config.pad_id == -1 else config.pad_id
    if not 0 <= pad_id < model.vocab_size:
        raise ConfigError(
            f"memory.engram.pad_id is {config.pad_id}; set a token id from 0 to {model.vocab_size - 1}, or -1 for the "
            "end-of-document token"
        )
    if not config.fold_tokens:
        fold = None
    elif fold is None or len(fold) != model.vocab_size:
        raise ValueError(f"fold_tokens needs a lookup of {model.vocab_size} entries")
    specs = hash_specs(config, model.vocab_size if fold is None else folded_vocab_size(fold))
    return [EngramStream(config, specs[layer], fold=fold, pad_id=pad_id) for layer in layers if layer in specs]


def _bank_streams(model: ModelConfig, config: BankConfig, *, layers: Sequence[int], seed: int) -> list[Stream]:
    own = [layer for layer in layers if not config.layers or layer in config.layers]
    levels = [level for level, units in enumerate(config.units, start=1) if units]
    if not own:
        return []
    return [BankStream(config, level, layers=own, hidden_size=model.hidden_size, seed=seed) for level in levels]
