"""Safetensors files written piece by piece: no tensor needs to be in memory as a whole, and the checksum costs no second read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megamem_checkpoints.manifest import FileRecord

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Callable[[str], Iterable[Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Write a safetensors file durably; returns the size and checksum of what was written.

    Args:
        path: The file; its folder exists. What an error leaves behind is no valid file.
        tensors: Dtype and shape by name.
        pieces: The content of a tensor, cut along its first dimension, in order; each tensor is asked for once, and one
            piece is held at a time. On any device.
        metadata: Texts for the header, such as ``{"format": "pt"}``.

    Raises:
        ValueError: pieces are not what ``tensors`` says.
        OSError: the file cannot be written.
    """
    # Wide types first, so that every tensor is aligned for its type.
    names = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        _append(file.fileno(), len(text).to_bytes(8, "little") + text, digest)
        for name in names:
            dtype, shape = tensors[name]
            missing = math.prod(shape) * dtype.itemsize
            for piece in pieces(name):
                if piece.dtype != dtype or piece.shape[1:] != shape[1:] or piece.nbytes > missing:
                    raise ValueError(
                        f"a piece {piece.dtype} {list(piece.shape)} of {name}, which is {dtype} {list(shape)}"
                    )
                missing -= piece.nbytes
                _append(file.fileno(), _bytes(piece), digest)
            if missing:
                raise ValueError(f"the pieces of {name}, {dtype} {list(shape)}, lack {missing} bytes")
        os.fsync(file.fileno())
    return FileRecord(bytes=8 + len(text) + offset, sha256=digest.hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """:func:`write_safetensors` of tensors that are there as a whole."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_safetensors(path, shapes, lambda name: (tensors[name],))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _append(descriptor: int, data: bytes | memoryview, digest: hashlib._Hash) -> None:
    digest.update(data)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
