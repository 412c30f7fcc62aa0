"""A Hugging Face model as the first checkpoint of a run: weights alone, in the canonical format, loadable under any layout."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megamem
from megamem.errors import ExportError
from megamem.files import TOKENIZER_FILES, write_text
from megamem_checkpoints import dense, directory
from megamem_checkpoints.files import FILE_BYTES
from megamem_checkpoints.hf.mapping import Gathered
from megamem_checkpoints.hf.pretrained import Pretrained
from megamem_checkpoints.manifest import FILE_NAME, FORMAT_VERSION, DenseRecord, FileRecord, Manifest, plain_json
from megamem_checkpoints.stream import write_safetensors


def copy_tokenizer(source: Path, folder: Path) -> Path:
    """Copy the tokenizer files of a model directory into ``folder``, unchanged; returns what ``data.tokenizer.model`` names.

    ExportError where there is neither a ``tokenizer.json`` nor a sentencepiece ``tokenizer.model``.
    """
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    decisive = [name for name in present if name in ("tokenizer.json", "tokenizer.model")]
    if not decisive:
        raise ExportError(
            f"{source} has no tokenizer.json; put the model's tokenizer there (AutoTokenizer writes one with save_pretrained)"
        )
    folder.mkdir(parents=True)
    for name in present:
        shutil.copyfile(source / name, folder / name)
    return folder / decisive[0]


def write_checkpoint(pretrained: Pretrained, root: Path, *, meta: Mapping[str, Any]) -> Path:
    """Write ``root/step_00000000``: the weights in fp32 without optimizer state; returns its path.

    One canonical tensor is in memory at a time. ``meta`` is what a run would hand to
    :meth:`megamem_checkpoints.checkpointer.Checkpointer.save`. ``root`` must be empty and nobody else's.

    Raises:
        ExportError: a weight cannot be read.
        OSError: the checkpoint cannot be written.
    """
    final = root / directory.name_of(0)
    temporary = final.with_name(final.name + ".tmp")
    root.mkdir(parents=True)
    directory.prepare(root, temporary)
    shapes = {item.name: _shape(pretrained, item) for item in pretrained.canonical}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        megamem_version=megamem.__version__,
        step=0,
        world_size=1,
        meta=plain_json(meta),
        files=_write_weights(pretrained, temporary, shapes),
        dense={name: DenseRecord(shape=list(shape)) for name, shape in shapes.items()},
        tables={},
    )
    write_text(temporary / FILE_NAME, manifest.dumps())
    directory.publish(temporary, final)
    return final


def _write_weights(
    pretrained: Pretrained, temporary: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, FileRecord]:
    items = {item.name: item for item in pretrained.canonical}

    def pieces(name: str) -> Iterator[Tensor]:
        item = items[name]
        yield item.join([pretrained.tensor(part) for part in item.parts])

    files = {}
    cuts = list(_cut(shapes))
    for number, names in enumerate(cuts, start=1):
        name = f"{dense.FOLDER}/shard-00001-model-{number:05d}-of-{len(cuts):05d}.safetensors"
        described = {name: (torch.float32, shapes[name]) for name in names}
        files[name] = write_safetensors(temporary / name, described, pieces)
    return files


def _cut(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names in files of about ``FILE_BYTES``."""
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        if names and filled + size > FILE_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _shape(pretrained: Pretrained, item: Gathered) -> tuple[int, ...]:
    parts = [torch.empty(pretrained.tensors[part][1], device="meta") for part in item.parts]
    return tuple(item.join(parts).shape)
