"""Dense state through ``torch.distributed.checkpoint``: safetensors with global offsets, which any layout reads.

DCP's default file format pickles its metadata; its Hugging Face format does not: each file's header carries the
offsets of its shards. Keys are ``<canonical name>`` for the fp32 master weight and ``<moment>.<canonical name>`` for
optimizer state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from megamem.errors import CheckpointError
from megamem_checkpoints.files import FILE_BYTES, in_parallel
from megamem_checkpoints.manifest import DenseRecord

if TYPE_CHECKING:
    from megamem.models.canonical import CanonicalEntry
    from megamem.parallel.groups import Groups

MASTER = "master"
FOLDER = "dense"


def key_of(state: str, name: str) -> str:
    """Key of one state tensor of the tensor ``name``."""
    return name if state == MASTER else f"{state}.{name}"


class Sharding:
    """How local tensors of a layout lie in global ones. Collective over the tensor-parallel groups when it is made."""

    def __init__(self, groups: Groups | None) -> None:
        self._groups = groups
        self._meshes: dict[bool, DeviceMesh] = {}
        """By whether they are of routed experts, which have a tensor-parallel group of their own."""
        for expert, group in ((False, groups.tp), (True, groups.etp)) if groups is not None else ():
            if group.size() > 1:
                self._meshes[expert] = DeviceMesh.from_group(group, "cpu")
        self._loads: dict[bool, list[int]] = {}

    def shape(self, entry: CanonicalEntry) -> list[int]:
        """Global shape of an entry."""
        shape = list(entry.tensor.shape)
        shape[0] = len(range(*entry.rows.indices(shape[0])))
        if entry.tp_dim is not None and (mesh := self._meshes.get(entry.is_expert)):
            shape[entry.tp_dim] *= mesh.size()
        return shape

    def place(self, entry: CanonicalEntry, local: Tensor) -> Tensor:
        """``local`` with its global offsets; shares its memory."""
        mesh = self._meshes.get(entry.is_expert)
        if mesh is None or entry.tp_dim is None:
            return local
        shape = torch.Size(self.shape(entry))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(entry.tp_dim)], run_check=False, shape=shape, stride=stride)

    def keeps(self, entry: CanonicalEntry) -> bool:
        """Whether this rank is the one of its replicas that writes ``entry``.

        Spreads tensors over replicas, so that no rank holds more than its share of the states in host memory. Every
        replica must ask about the same entries in the same order. Copies within a tensor-parallel group are left to
        DCP.
        """
        if self._groups is None:
            return True
        replicas = self._groups.expert_dp if entry.is_expert else self._groups.dp_cp
        loads = self._loads.setdefault(entry.is_expert, [0] * replicas.size())
        lightest = loads.index(min(loads))
        loads[lightest] += entry.tensor.numel()
        return lightest == replicas.rank()


def by_tensor(entries: Iterable[CanonicalEntry]) -> list[list[CanonicalEntry]]:
    """Entries grouped by the tensor they are part of, in order of first appearance."""
    groups: dict[int, list[CanonicalEntry]] = {}
    for entry in entries:
        groups.setdefault(id(entry.tensor), []).append(entry)
    return list(groups.values())


def collect(
    entries: Iterable[CanonicalEntry], state_of: Callable[[nn.Parameter], dict[str, Tensor]], sharding: Sharding
) -> tuple[dict[str, Tensor], dict[str, DenseRecord]]:
    """A copy on the host of the fp32 state that this rank writes, and the records of all its entries but copies.

    Collective, as ``state_of``, which is asked about parameters only: a buffer is its own state.
    """
    state_dict: dict[str, Tensor] = {}
    records: dict[str, DenseRecord] = {}
    for group in by_tensor(entry for entry in entries if not entry.is_copy):
        tensor = group[0].tensor
        states = state_of(tensor) if isinstance(tensor, nn.Parameter) else {MASTER: tensor}
        for entry in group:
            moments = sorted(states.keys() - {MASTER})
            records[entry.name] = DenseRecord(shape=sharding.shape(entry), moments=moments)
            if sharding.keeps(entry):
                for state, value in states.items():
                    local = value.detach()[entry.rows].to("cpu", torch.float32, copy=True)
                    state_dict[key_of(state, entry.name)] = sharding.place(entry, local)
    return state_dict, records


class _Writer(HuggingFaceStorageWriter):
    """Cuts each rank's shards into files of bounded size."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data={"shard_index": i, "fqn_to_index_mapping": _cut(plan)})
            for i, plan in enumerate(plans, start=1)
        ]


def _cut(plan: SavePlan) -> dict[str, int]:
    files: dict[str, int] = {}
    index, filled = 1, 0
    for item in plan.items:
        size = item.tensor_storage_size() or 0
        if filled and filled + size > FILE_BYTES:
            index, filled = index + 1, 0
        files[item.index.fqn] = index
        filled += size
    return files


class Reader(HuggingFaceStorageReader):
    """Reads the headers of all files once, whatever the number of loads, and ``threads`` files at once."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__(str(path))
        self._threads = threads
        self._metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata()
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """A file for each thread. DCP's own threads would turn what is wrong with a file into a count of files."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        read = super().read_data
        in_parallel(self._threads, lambda items: read(dataclasses.replace(plan, items=items), planner), files.values())
        done: Future[None] = Future()
        done.set_result(None)
        return done


def write(root: Path, state_dict: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Save every rank's share below ``root``; copies of a shard are written once. Collective over ``group``; None for a process
    alone."""
    # Without a process group there is nothing to be warned about; the filters of warnings are not safe to change on a thread.
    with _quiet() if group is None else contextlib.nullcontext():
        try:
            dcp.save(
                dict(state_dict),
                storage_writer=_Writer(str(root / FOLDER), save_distributed=True),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:
            raise _first_cause(error) from None


def files_of(root: Path, rank: int) -> list[Path]:
    """Files that ``rank`` wrote below ``root``."""
    return sorted((root / FOLDER).glob(f"shard-{rank + 1:05d}-*.safetensors"))


def read(reader: Reader, targets: Mapping[str, Tensor]) -> None:
    """Fill ``targets`` (key to fp32 tensor, plain or sharded) in place; local, no collective."""
    if not targets:
        return
    with _quiet():
        try:
            dcp.load(
                dict(targets),
                storage_reader=reader,
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
        except CheckpointException as error:
            raise _first_cause(error) from None


def batches(
    entries: Iterable[CanonicalEntry], states_of: Callable[[CanonicalEntry], list[str]]
) -> Iterator[list[tuple[list[CanonicalEntry], list[str]]]]:
    """Tensors with the names of their states, in batches of about ``FILE_BYTES`` of state."""
    batch: list[tuple[list[CanonicalEntry], list[str]]] = []
    filled = 0
    for group in by_tensor(entries):
        states = states_of(group[0])
        size = group[0].tensor.numel() * 4 * len(states)
        if batch and filled + size > FILE_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append((group, states))
        filled += size
    if batch:
        yield batch


def read_batch(
    reader: Reader, batch: list[tuple[list[CanonicalEntry], list[str]]], sharding: Sharding
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Tensors of one batch with their states: fp32, of the tensor's local shape."""
    loaded: list[tuple[Tensor, dict[str, Tensor]]] = []
    targets: dict[str, Tensor] = {}
    for group, states in batch:
        tensor = group[0].tensor
        values = {state: torch.empty(tensor.shape, dtype=torch.float32) for state in states}
        for entry in group:
            for state, value in values.items():
                targets[key_of(state, entry.name)] = sharding.place(entry, value[entry.rows])
        loaded.append((tensor, values))
    read(reader, targets)
    return loaded


def _first_cause(error: CheckpointException) -> Exception:
    """What went wrong on the first rank that failed; DCP wraps it in a BaseException."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return CheckpointError(f"{type(cause).__name__} on rank {rank}: {cause}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that a load without collectives is one: that is what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
