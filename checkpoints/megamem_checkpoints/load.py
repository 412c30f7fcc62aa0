"""Reading a checkpoint into a run of any layout: everything is checked before anything is changed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from megamem.errors import CheckpointError
from megamem.observe.phases import phases
from megamem_checkpoints import dense, rng, tables
from megamem_checkpoints.manifest import TableRecord
from megamem_checkpoints.owned import Base
from megamem_checkpoints.ranks import Ranks
from megamem_checkpoints.reader import CheckpointReader

if TYPE_CHECKING:
    from megamem.memory.table import OwnedTable
    from megamem.models.canonical import CanonicalEntry
    from megamem.parallel.groups import Groups

_log = logging.getLogger(__name__)

_MEMORY = re.compile(r"\.(engram|bank)\.")

_SETTINGS = (
    ("embedding.", "model.vocab_size, model.make_vocab_size_divisible_by or model.hidden_size"),
    ("output_layer.", "model.vocab_size, model.make_vocab_size_divisible_by or model.hidden_size"),
    ("q_layernorm", "model.kv_channels or model.num_attention_heads"),
    ("k_layernorm", "model.kv_channels or model.num_attention_heads"),
    (".self_attention.", "model.num_attention_heads, model.num_query_groups, model.kv_channels or model.hidden_size"),
    (".router.", "model.moe.num_experts or model.hidden_size"),
    (".mlp.experts.", "model.moe.ffn_hidden_size or model.hidden_size"),
    (".mlp.shared_experts.", "model.moe.shared_expert_hidden_size or model.hidden_size"),
    (".mlp.", "model.ffn_hidden_size or model.hidden_size"),
    (".engram.table", "memory.engram.rows_per_head, memory.engram.heads, memory.engram.orders or memory.engram.width"),
    (".engram.conv", "memory.engram.conv_kernel_size or model.hidden_size"),
    (".engram.", "memory.engram.heads, memory.engram.orders, memory.engram.width or model.hidden_size"),
    (".bank.", "memory.bank.units, memory.bank.branching or model.hidden_size"),
    ("norm", "model.hidden_size"),
)


def load(
    path: Path,
    *,
    groups: Groups | None,
    entries: Sequence[CanonicalEntry],
    put_state: Callable[[nn.Parameter, dict[str, Tensor]], None],
    owned: Mapping[str, OwnedTable],
    optimizer_state: bool,
    verify: bool,
    new_memories: bool = False,
    threads: int = 1,
) -> tuple[dict[str, Any], Base]:
    """See :meth:`megamem_checkpoints.checkpointer.Checkpointer.load`; also returns what the next save may add to."""
    ranks = Ranks(groups.world if groups is not None else None)
    reader = ranks.together(lambda: CheckpointReader(path, threads=threads))
    if len(set(ranks.gather((str(path), reader.step)))) > 1:
        raise CheckpointError(f"ranks were asked to load different checkpoints, this one {path}; name one for all")
    sharding = dense.Sharding(groups)
    names = _union(ranks, (entry.name for entry in entries))
    table_names = _union(ranks, owned)
    kept: set[str] = set()
    if new_memories:
        kept = {name for name in names if _MEMORY.search(name)} - set(reader.manifest.dense)
        kept |= table_names - set(reader.manifest.tables)
        entries = [entry for entry in entries if entry.name not in kept]
        owned = {name: table for name, table in owned.items() if name not in kept}
        names, table_names = names - kept, table_names - kept
    ranks.together(lambda: _check(reader, entries, sharding, names, owned, table_names, optimizer_state))
    if verify:
        ranks.together(lambda: reader.verify(ranks.rank, ranks.size, threads=threads))

    def states_of(entry: CanonicalEntry) -> list[str]:
        moments = reader.manifest.dense[entry.name].moments if optimizer_state else []
        return [dense.MASTER, *moments]

    batches = list(dense.batches(entries, states_of))
    for index in range(max(ranks.gather(len(batches)))):
        batch = batches[index] if index < len(batches) else []
        with phases("checkpoint"):  # each is a sign that the rank gets on
            read = ranks.together(partial(dense.read_batch, reader.dense_reader, batch, sharding))
        for tensor, states in read:
            if isinstance(tensor, nn.Parameter):
                put_state(tensor, {name: state.to(tensor.device) for name, state in states.items()})
            else:
                tensor.copy_(states[dense.MASTER])

    def restore_tables() -> None:
        for name, table in owned.items():
            record = reader.manifest.tables[name]
            with phases("checkpoint"):
                tables.restore(path, record, table, state=optimizer_state, label=reader.label, threads=threads)

    # Once for all: pipeline stages own different numbers of tables, and every call is collective.
    ranks.together(restore_tables)
    restored = _restore_rng(reader, ranks) if optimizer_state else {}
    loaded = {"step": reader.step, "meta": reader.meta, "rng": restored, "kept": sorted(kept)}
    return loaded, Base.of(path, reader.manifest, owned)


def _union(ranks: Ranks, names: Iterable[str]) -> set[str]:
    return set().union(*ranks.gather(list(names)))


def _check(
    reader: CheckpointReader,
    entries: Sequence[CanonicalEntry],
    sharding: dense.Sharding,
    names: set[str],
    owned: Mapping[str, OwnedTable],
    table_names: set[str],
    optimizer_state: bool,
) -> None:
    """CheckpointError unless the checkpoint holds exactly this model, and its optimizer state where that is wanted."""
    manifest = reader.manifest
    _check_names(reader.path, "dense tensors", names, set(manifest.dense))
    _check_names(reader.path, "memory tables", table_names, set(manifest.tables))
    for entry in entries:
        saved = manifest.dense[entry.name]
        _check_shape(reader.path, entry.name, saved.shape, sharding.shape(entry))
        if optimizer_state and isinstance(entry.tensor, nn.Parameter) and not saved.moments:
            raise CheckpointError(
                f"checkpoint {reader.path} has no optimizer state of {entry.name}; "
                "take its weights only, through checkpoint.load"
            )
    for name, table in owned.items():
        saved_table, wanted = manifest.tables[name], tables.describe(table)
        _check_shape(reader.path, name, [saved_table.rows, saved_table.width], [wanted.rows, wanted.width])
        if optimizer_state and saved_table.state != wanted.state:
            raise CheckpointError(
                f"table {name} of checkpoint {reader.path} has row optimizer state {_state_text(saved_table)} "
                f"and this run keeps {_state_text(wanted)}; set memory.optimizer.name as in the checkpoint, or take "
                "its weights only, through checkpoint.load"
            )


def _check_names(path: Path, what: str, wanted: set[str], saved: set[str]) -> None:
    missing, unexpected = sorted(wanted - saved), sorted(saved - wanted)
    if missing or unexpected:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has {_some(unexpected)} which this model lacks"] if unexpected else []
        raise CheckpointError(
            f"checkpoint {path} is of another model: of the {what} it {' and '.join(parts)}; set the model and "
            "memory sections as in the run that wrote it"
        )


def _some(names: Sequence[str], shown: int = 8) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _check_shape(path: Path, name: str, saved: list[int], wanted: list[int]) -> None:
    if saved != wanted:
        setting = next((setting for pattern, setting in _SETTINGS if pattern in name), "the model section")
        raise CheckpointError(
            f"{name} is {saved} in checkpoint {path} and {wanted} in this run; set {setting} as in "
            "the run that wrote it"
        )


def _state_text(table: TableRecord) -> str:
    return ", ".join(f"{name} {item.dtype}{item.shape}" for name, item in sorted(table.state.items())) or "nothing"


def _restore_rng(reader: CheckpointReader, ranks: Ranks) -> dict[str, Tensor]:
    if reader.manifest.world_size != ranks.size:
        _log.info(
            "%s was written by %d ranks and is read by %d: their random states start afresh",
            reader.path,
            reader.manifest.world_size,
            ranks.size,
        )
        return {}
    return rng.restore(reader.path / rng.file_name(ranks.rank))
