"""A Hugging Face model directory as a source of weights: opened, checked against its configuration, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamem.errors import ExportError
from megamem.models.config import ModelConfig
from megamem_checkpoints.hf.inherited import SPECIAL_TOKENS
from megamem_checkpoints.hf.mapping import Gathered, check_complete, gather_names
from megamem_checkpoints.hf.native.families import FAMILIES, model_of
from megamem_checkpoints.hf.native.memory_free import saved_shapes

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Pretrained:
    """A Llama, Qwen3, Qwen3-MoE or Mixtral checkpoint on disk."""

    folder: Path
    config: Any
    """Its ``PreTrainedConfig``."""
    model: ModelConfig
    """The same model as a ``model`` section."""
    tensors: Mapping[str, tuple[Path, tuple[int, ...], torch.dtype]]
    """File, shape and dtype of every weight."""
    dropped: Mapping[str, str]
    """Tensors in its files that are not taken, with the reason."""

    @classmethod
    def open(cls, folder: Path, *, make_vocab_size_divisible_by: int = 128) -> Pretrained:
        """Read configuration and headers; ExportError unless it is a whole checkpoint of a model that can be imported."""
        config = _config(folder)
        model = model_of(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
        found = _headers(folder)
        dropped = {name: reason for name in found if (reason := _why_dropped(name, config))}
        tensors = {name: found[name] for name in found if name not in dropped}
        shapes = {name: shape for name, (_, shape, _) in tensors.items()}
        check_complete(shapes, saved_shapes(config), advice=f"download {folder} again, from a plain checkpoint")
        return cls(folder, config, model, tensors, dropped)

    @property
    def family(self) -> str:
        """One of :data:`~megamem_checkpoints.hf.native.families.FAMILIES`."""
        return self.config.model_type

    @property
    def precision(self) -> str:
        """``bf16`` where all weights are stored in it, else ``fp32``, which holds every other dtype exactly."""
        return "bf16" if {dtype for _, _, dtype in self.tensors.values()} == {torch.bfloat16} else "fp32"

    @property
    def inherited(self) -> dict[str, Any]:
        """What an export of the run gives back although training has no use for it, see
        :mod:`~megamem_checkpoints.hf.inherited`; ExportError for a ``generation_config.json`` that is none."""
        return {
            "model_type": self.family,
            "dropped": dict(self.dropped),
            "max_position_embeddings": self.config.max_position_embeddings,
            **{name: getattr(self.config, name) for name in SPECIAL_TOKENS},
            "generation_config": _generation_config(self.folder / "generation_config.json"),
        }

    @cached_property
    def canonical(self) -> list[Gathered]:
        """The canonical tensors that the weights make up, by name."""
        return sorted(gather_names(self.tensors, self.model, self.family), key=lambda item: item.name)

    def tensor(self, name: str) -> Tensor:
        """One weight: whole, fp32."""
        path = self.tensors[name][0]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name).float()
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from None


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{path} cannot be read ({error}); name the directory of a Hugging Face model") from None
    if model_type not in FAMILIES:
        raise ExportError(f"{folder} holds a {model_type} model; {', '.join(FAMILIES)} models can be imported")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' validation has errors of its own, without a common base
        reason = " ".join(str(error).split())
        raise ExportError(f"{path} is no configuration of a {model_type} model ({reason}); download it again") from None


def _generation_config(path: Path) -> dict[str, Any]:
    """Its settings; none where there is no such file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None


def _headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
    """File, shape and dtype of every tensor, from the headers of all files; safetensors checks their lengths."""
    tensors: dict[str, tuple[Path, tuple[int, ...], torch.dtype]] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    entry = file.get_slice(name)
                    dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
                    if dtype not in _DTYPES:
                        raise ExportError(f"{name} in {path} is {dtype}; take a checkpoint in fp32, bf16 or fp16")
                    if name in tensors:
                        raise ExportError(f"{name} is in {tensors[name][0]} and in {path}; download {folder} again")
                    tensors[name] = path, shape, _DTYPES[dtype]
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from None
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.exists():
        if (folder / _SINGLE).exists():
            return [folder / _SINGLE]
        advice = "download its safetensors files"
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            advice = "its pickled weights are not opened: load them with transformers in a place you trust and save_pretrained"
        raise ExportError(f"{folder} has no {_SINGLE} and no {_INDEX}; {advice}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ExportError(f"{folder / missing[0]} is missing ({len(missing)} of {len(names)} files); download it again")
    return [folder / name for name in names]


def _why_dropped(name: str, config: Any) -> str:
    if name.endswith("rotary_emb.inv_freq"):
        return "RoPE frequencies follow from the configuration"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the output projection is tied to the embedding"
    return ""


def _damaged(path: Path, error: Exception) -> ExportError:
    return ExportError(f"{path} is damaged ({error}); download it again")
