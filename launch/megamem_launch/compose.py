"""From a configuration to the parts of a run: the one place where they meet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megamem.batch import TokenLoader
from megamem.config import to_dict
from megamem.errors import ConfigError
from megamem.memory.config import MemoryConfig
from megamem.memory.engine import MemoryEngine
from megamem.memory.links import create_links
from megamem.memory.names import table_names
from megamem.memory.optimizers import build_row_optimizer
from megamem.memory.spec import TOUCHED
from megamem.memory.streams import Stream, build_streams
from megamem.memory.tiers.base import record_bytes
from megamem.memory.tiers.disk import DISK_INDEX_BYTES
from megamem.memory.tiers.limits import available_host_bytes
from megamem.models.canonical import CanonicalEntry, canonical_entries
from megamem.models.gpt import build_model
from megamem.parallel.groups import Groups
from megamem.parallel.zero import ZeroEngine
from megamem_checkpoints.checkpointer import Checkpointer
from megamem_checkpoints.compare import compare_models, differences
from megamem_checkpoints.directory import find_checkpoint, latest
from megamem_checkpoints.owned import index_bytes
from megamem_checkpoints.reader import CheckpointReader
from megamem_data.loader import build_loader
from megamem_data.prepared import PreparedData
from megamem_kernels.formats import row_fields
from megamem_kernels.parallel import set_threads
from megamem_launch.config import RunConfig, load_config
from megamem_launch.rundir import check_lease


def open_data(config: RunConfig, *, verify: bool = True) -> PreparedData:
    """The prepared data of a run, checked against the configuration and, with ``verify``, against its checksums (each
    rank reads its share of the files); fills ``model.vocab_size`` where it is 0."""
    if not config.data.path:
        raise ConfigError("data.path is empty; set the directory that `megamem data prepare` wrote")
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    data = PreparedData.open(Path(config.data.path), verify=verify, rank=rank, ranks=ranks)
    model = config.model
    if not model.vocab_size:
        model.vocab_size = data.vocab_size
    elif model.vocab_size < data.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the {data.vocab_size} entries of the tokenizer in "
            f"{config.data.path}; set model.vocab_size=0 to take the number from the data"
        )
    bank = config.memory.bank
    if bank.enabled and (data.levels < bank.levels or data.branching != bank.branching):
        raise ConfigError(
            f"memory.bank needs a cluster tree of {bank.levels} levels with branching {bank.branching}, but {config.data.path} "
            f"has {data.levels} levels with branching {data.branching}; run `megamem data prepare` with this memory.bank and "
            "another data.path"
        )
    return data


def precision_of(config: RunConfig) -> Literal["fp32", "bf16"]:
    """``fp32`` or ``bf16``: what ``train.precision`` means on this machine."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if torch.cuda.is_available() else "fp32"


@dataclass(slots=True)
class Parts:
    """The parts of a run on one rank."""

    config: RunConfig
    data: PreparedData
    groups: Groups
    model: torch.nn.ModuleList
    """The chunks of layers of this rank's pipeline stage."""
    zero: ZeroEngine
    memory: MemoryEngine
    entries: list[CanonicalEntry]
    loader: TokenLoader
    validation: TokenLoader | None
    checkpointer: Checkpointer
    imported: dict[str, Any]
    """What exports inherit from the Hugging Face model that the run started from; empty where there is none."""

    def close(self) -> None:
        """End the threads, and release tables and their files."""
        self.checkpointer.close()
        self.loader.close()
        if self.validation is not None:
            self.validation.close()
        self.memory.close()


def fold_of(config: RunConfig, data: PreparedData) -> np.ndarray | None:
    """The canonical id of every token when ``memory.engram.fold_tokens`` is on."""
    if not (config.memory.engram.layers and config.memory.engram.fold_tokens):
        return None
    from megamem.memory.folding import fold_from_tokenizer

    return fold_from_tokenizer(data.tokenizer_model, vocab_size=config.model.vocab_size)


def build_parts(config: RunConfig, data: PreparedData, groups: Groups) -> Parts:
    """Build model, optimizer, memory and loaders for this rank."""
    layout, place, train = groups.layout, groups.coordinates, config.train
    precision = precision_of(config)
    model = torch.nn.ModuleList(
        build_model(
            config.model,
            config.memory,
            groups=groups,
            seq_length=config.data.seq_length,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            seed=train.seed,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=train.recompute,
            chunk=chunk,
        )
        for chunk in range(layout.vpp)
    )
    zero = ZeroEngine(
        model,
        optimizer=config.optimizer,
        groups=groups,
        precision=precision,
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.global_batch_size // (train.micro_batch_size * layout.dp),
    )
    streams = build_streams(
        config.model,
        config.memory,
        layers=layout.stage_layers(config.model.num_layers, place.pp),
        eos_id=data.eos_id,
        fold=fold_of(config, data),
        seed=train.seed,
    )
    check_host_memory(
        config.memory,
        streams,
        owners=layout.stage_size,
        device=groups.device,
        incremental=config.checkpoint.incremental,
    )
    splits: list[Literal["train", "validation"]] = ["train", "validation"] if train.eval_batches else ["train"]
    loaders = [
        build_loader(
            data,
            split=split,
            seq_length=config.data.seq_length,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            dp_rank=place.dp,
            dp_size=layout.dp,
            seed=train.seed,
            levels=config.memory.bank.levels if config.memory.bank.enabled else 0,
        )
        for split in splits
    ]
    set_threads(config.memory.threads or kernel_threads())
    memory = MemoryEngine(
        streams,
        memory=config.memory,
        seed=train.seed,
        links=create_links(layout, config.memory, groups.device),
        device=groups.device,
        disk_root=Path(config.memory.disk.path or config.runs_dir) / config.name / "tiers",
        resume=resume_label(config),
        slice_index=place.slice,
        slices=layout.slices,
        averaged_over=layout.dp * layout.cp,
    )

    return Parts(
        config=config,
        data=data,
        groups=groups,
        model=model,
        zero=zero,
        memory=memory,
        entries=canonical_entries(model, groups),
        loader=loaders[0],
        validation=loaders[1] if train.eval_batches else None,
        checkpointer=Checkpointer(
            config.run_dir / "checkpoints",
            config.checkpoint,
            groups=groups,
            before_publish=partial(check_lease, config.run_dir),
        ),
        imported=inherited(config),
    )


def kernel_threads() -> int:
    """An equal share of the cores that this process may run on for each rank of the node."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_host_memory(
    memory: MemoryConfig,
    streams: Sequence[Stream],
    *,
    owners: int,
    device: torch.device,
    incremental: Literal["auto", "on", "off"],
) -> None:
    """ConfigError where what this stage's tables, spread over ``owners``, want of host memory is not free in this machine: for
    their rows and state, and for saving them (``checkpoint.incremental``).

    To be called before any rank of the node has allocated its tables.
    """
    state = build_row_optimizer(memory.optimizer)
    tiers = {"host"} if device.type == "cuda" else {"host", "device"}
    bytes_of_owner, bytes_on_disk, records_on_disk = 0.0, 0.0, 0.0
    for spec in (spec for stream in streams for spec in stream.tables):
        storage = memory.storage_of(spec.name)
        bytes_of_owner += index_bytes(-(-spec.rows // owners), incremental)
        parts = (
            (storage.tier, row_fields(storage.format, spec.width)),
            (storage.tier_of_state, (*state.state_fields(spec.width), TOUCHED)),
        )
        for tier, fields in parts:
            if tier in tiers:
                bytes_of_owner += spec.rows * record_bytes(fields) / owners
            elif tier == "disk":
                records_on_disk += spec.rows / owners
                bytes_on_disk += spec.rows * record_bytes(fields) / owners
    bytes_of_owner += min(memory.disk.cache_gib * 2**30, bytes_on_disk) + records_on_disk * DISK_INDEX_BYTES
    needed = bytes_of_owner * min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), owners) / 2**30
    free = available_host_bytes() / 2**30
    if needed > free:
        first = "lower memory.disk.cache_gib" if bytes_on_disk else "set memory.storage.tier or state_tier to disk"
        raise ConfigError(
            f"memory tables, their optimizer state and saving them want {needed:,.1f} GiB of host memory and {free:,.1f} GiB are "
            f"free in this machine; {first}, lower memory.engram.rows_per_head or width, memory.bank.units or branching, or use "
            "more machines"
        )


def resume_label(config: RunConfig) -> str:
    """What disk tables of an earlier incarnation must have been committed under to be taken over; empty for none."""
    path, resume = initial_checkpoint(config)
    return CheckpointReader(path).label if path is not None and resume else ""


def inherited(config: RunConfig) -> dict[str, Any]:
    """What the checkpoint that the run starts from has of an imported model, see :mod:`megamem_checkpoints.hf.inherited`."""
    path, _ = initial_checkpoint(config)
    return dict(CheckpointReader(path).meta.get("imported", {})) if path is not None else {}


def checkpoint_meta(parts: Parts, progress: Mapping[str, Any], guard: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data saved with a checkpoint: what a resume and an export need besides tensors."""
    return {
        "config": to_dict(parts.config),
        "vocab_size": parts.config.model.vocab_size,
        "precision": precision_of(parts.config),
        "eos_id": parts.data.eos_id,
        "tokenizer_sha256": parts.data.tokenizer.sha256,
        "layout": asdict(parts.groups.layout),
        "data": parts.loader.state_dict(),
        "optimizer": parts.zero.state_dict(),
        "progress": dict(progress),
        "guard": dict(guard),
        "tokens_seen": progress["tokens_seen"],
        "final_losses": dict(progress["evaluations"]),
        "imported": parts.imported,
    }


def check_start(config: RunConfig, data: PreparedData) -> None:
    """Refuse, before anything is built or written, what this run cannot start from: another run, model or tokenizer."""
    check_same_run(config)
    path, resume = initial_checkpoint(config)
    if path is not None:
        new_memories = config.checkpoint.new_memories and not resume
        current = {"config": to_dict(config), "tokenizer_sha256": data.tokenizer.sha256}
        compare_models(CheckpointReader(path).meta, current, new_memories=new_memories)


def check_ranks_agree(config: RunConfig, data: PreparedData) -> None:
    """ConfigError on every rank where one of them has another configuration or other data; nodes may hold copies of both.

    Comes before all that is collective: what ranks do together follows from their configuration.
    """
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, {"settings": to_dict(config), "data": {"fingerprint": data.fingerprint}})
    for rank, other in enumerate(seen):
        difference = next(differences(seen[0], other), None)
        if difference is not None:
            name, first, here = difference
            raise ConfigError(
                f"rank {rank} has {name}={json.dumps(here)} where rank 0 has {json.dumps(first)}; "
                "give all ranks the same configuration and the same data"
            )


def check_same_run(config: RunConfig) -> None:
    """Refuse to continue a directory that holds a run of another model or data; ConfigError names the first difference."""
    saved = config.run_dir / "config.yaml"
    if not saved.exists():
        return
    earlier = load_config(saved)
    difference = next(differences(_identity(earlier), _identity(config)), None)
    before, now = to_dict(earlier), to_dict(config)
    for path in ("global_batch_size", "seed"):
        if difference is None and before["train"][path] != now["train"][path]:
            difference = (f"train.{path}", before["train"][path], now["train"][path])
    if difference is not None:
        setting, old, new = difference
        raise ConfigError(
            f"{config.run_dir} holds another run ({setting} is {json.dumps(old)} there and {json.dumps(new)} here); "
            "set name to start a new one"
        )


def _identity(config: RunConfig) -> dict[str, Any]:
    """What makes a run this run. On which tier its rows are and how they are fetched changes no result, and may change."""
    settings, memory = to_dict(config), config.memory
    kept = {name: settings["memory"][name] for name in ("engram", "bank", "optimizer", "staleness")}
    kept["format"] = {name: memory.storage_of(name).format for name in table_names(config.model, memory)}
    return {"model": settings["model"], "memory": kept, "data": settings["data"]}


def initial_checkpoint(config: RunConfig) -> tuple[Path | None, bool]:
    """The checkpoint to start from, and whether it continues this run (else only its weights are taken)."""
    own = latest(config.run_dir / "checkpoints")
    if own is not None:
        return own, True
    if not config.checkpoint.load:
        return None, False
    return find_checkpoint(Path(config.checkpoint.load)), False
