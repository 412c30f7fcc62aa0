"""Bytes on every wire, counted where all of torch.distributed passes: the methods of its process groups.

A *wire* is a purpose, told from the group that carries it (:func:`megamem.parallel.groups.wires`): ``row_exchange``,
``dense_reduce``, ``dense_gather`` (both ZeRO's), ``tp``, ``pp``, ``ep``, ``cp``, and ``control`` for numbers that all ranks agree
on. Gradients that are partial over tensor parallelism go over ``tp``, for the wire is where the bytes are.

What counts is what one rank sends, by an algorithm that sends as little as possible (:func:`sent_bytes`), whatever gloo or NCCL
does beneath. Importing this needs no torch, so that a planner can share the convention.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIRES = ("row_exchange", "dense_reduce", "dense_gather", "tp", "pp", "ep", "cp", "control")
DENSE = "dense"
"""A group of replicas: what it reduces is ``dense_reduce``, what it gathers ``dense_gather``."""

_SHARE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda g: 2 * (g - 1) / g,
    "all_gather": lambda g: g - 1,
    "reduce_scatter": lambda g: (g - 1) / g,
    "all_to_all": lambda g: (g - 1) / g,
    "reduce": lambda g: (g - 1) / g,
    "broadcast": lambda g: (g - 1) / g,
    "gather": lambda g: (g - 1) / g,
    "scatter": lambda g: (g - 1) / g,
    "send": lambda g: 1,
}


def sent_bytes(operation: str, nbytes: float, size: int) -> float:
    """Bytes that each of ``size`` ranks sends, on average, in a collective over ``nbytes``: the tensor of this rank that goes
    in (the whole one of ``reduce_scatter`` and ``all_to_all``, of equal parts; the rank's own part of ``all_gather``, ``gather``
    and ``scatter``).

    ``all_reduce`` takes ``2 (g - 1) / g`` of it, ``all_gather`` ``g - 1``, ``send`` all, the others ``(g - 1) / g``.
    """
    return nbytes * _SHARE[operation](size) if size > 1 else 0.0


@dataclass(slots=True)
class Traffic:
    """What one rank sent over one wire with one operation."""

    calls: float = 0
    sent: float = 0.0
    """Bytes, by :func:`sent_bytes`; exact where the parts of an all-to-all differ."""


class WireCounter:
    """Counts while :meth:`counting` is entered, on every thread. Nothing of a message is read but its size.

    Args:
        wires: Wire by name of the process group. Groups that are not in it count as ``control``.
    """

    def __init__(self, wires: Mapping[str, str]) -> None:
        self._wires = dict(wires)
        self._lock = threading.Lock()
        self._traffic: dict[tuple[str, str], Traffic] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count everything that this process sends within."""
        from torch.distributed import ProcessGroup

        # As they stand in the class: what getattr gives would not bind to a group any more once it is put back.
        replaced = {name: method for name, method in vars(ProcessGroup).items() if name in _METHODS}
        for name in replaced:
            setattr(ProcessGroup, name, self._counted(getattr(ProcessGroup, name), *_METHODS[name]))
        try:
            yield
        finally:
            for name, method in replaced.items():
                setattr(ProcessGroup, name, method)

    def take(self) -> dict[str, dict[str, Traffic]]:
        """By wire and operation, what was sent since the last call."""
        with self._lock:
            taken, self._traffic = self._traffic, {}
        result: dict[str, dict[str, Traffic]] = {}
        for (wire, operation), traffic in sorted(taken.items()):
            result.setdefault(wire, {})[operation] = traffic
        return result

    def _counted(self, method: Any, operation: str, size_of: Callable[..., float]) -> Any:
        @functools.wraps(method)
        def count(group: Any, *args: Any, **kwargs: Any) -> Any:
            if (size := group.size()) > 1:
                nbytes = size_of(group, *args)
                self._add(
                    group, operation, nbytes if operation == "all_to_all" else sent_bytes(operation, nbytes, size)
                )
            return method(group, *args, **kwargs)

        return count

    def _add(self, group: Any, operation: str, sent: float) -> None:
        wire = self._wires.get(group.group_name, "control")
        if wire == DENSE:
            wire = "dense_gather" if operation in ("all_gather", "broadcast") else "dense_reduce"
        if operation == "send":
            wire = "pp"  # of two stages megatron-core sends one direction over the default group
        with self._lock:
            traffic = self._traffic.setdefault((wire, operation), Traffic())
            traffic.calls += 1
            traffic.sent += sent


def _nbytes(tensors: Any) -> int:
    """Of a tensor, or of all in nested lists."""
    return sum(map(_nbytes, tensors)) if isinstance(tensors, (list, tuple)) else tensors.nbytes


def _first(group: Any, tensors: Any, *rest: Any) -> float:
    return _nbytes(tensors)


def _second(group: Any, outputs: Any, inputs: Any, *rest: Any) -> float:
    return _nbytes(inputs)


def _to_others(group: Any, output: Any, tensor: Any, output_splits: Any, splits: Any, *rest: Any) -> float:
    given = splits is not None and len(splits) > 0  # megatron-core gives arrays
    own = splits[group.rank()] / max(1, len(tensor)) if given else 1 / group.size()
    return float(tensor.nbytes * (1 - own))


def _list_to_others(group: Any, outputs: Any, inputs: Any, *rest: Any) -> float:
    return _nbytes(inputs) - inputs[group.rank()].nbytes


_METHODS: dict[str, tuple[str, Callable[..., float]]] = {
    "allreduce": ("all_reduce", _first),
    "allreduce_coalesced": ("all_reduce", _first),
    "reduce": ("reduce", _first),
    "broadcast": ("broadcast", _first),
    "gather": ("gather", _second),
    "scatter": ("scatter", _first),
    "allgather": ("all_gather", _second),
    "allgather_coalesced": ("all_gather", _second),
    "_allgather_base": ("all_gather", _second),
    "allgather_into_tensor_coalesced": ("all_gather", _second),
    "all_gather_single": ("all_gather", _second),
    "all_gather_single_coalesced": ("all_gather", _second),
    "reduce_scatter": ("reduce_scatter", _second),
    "_reduce_scatter_base": ("reduce_scatter", _second),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _second),
    "reduce_scatter_single": ("reduce_scatter", _second),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _second),
    "alltoall_base": ("all_to_all", _to_others),
    "all_to_all_single": ("all_to_all", _to_others),
    "alltoall": ("all_to_all", _list_to_others),
    "send": ("send", _first),
}
"""Methods of a process group, under their names of torch 2.11 to 2.13: the operation, and the size of what goes in (for an
all-to-all, of what goes to others)."""
