"""What becomes of a megamem model's tensors in Qwen4-Exp, and which tensors of Qwen4-Exp are zero.

Residual streams are mixed by half the mean of their norms, attention is gated by sigmoid(0) = 1/2, and so is the shared
expert. Whatever reads a mixed or gated state is doubled, which is exact in every floating-point format.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megamem.errors import ExportError
from megamem.memory.config import EngramConfig
from megamem.models.config import ModelConfig
from megamem_checkpoints.hf.native.qwen4_exp_config import STREAMS, carriers, conv_taps, layer_places

Change = Callable[[Tensor], Tensor]
"""Works on meta tensors too."""

_NUMBERED = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?:mlp\.experts\.(?P<expert>\d+)\.)?(?P<rest>.+)")
_NULL = (
    r"hyper_connection(_mixer)?\.(input_mix_weight_down|input_mix_weight_up|block_inject_weight)\.weight",
    r"\.self_attn\.indexer\.\w+\.weight",
    r"\.mlp\.shared_expert_gate\.weight",
)


@dataclass(frozen=True, slots=True)
class NativeTensor:
    """A tensor of Qwen4-Exp, made of one tensor of the ``megamem`` architecture."""

    name: str
    change: Change


class Rules:
    """The conversion of one model that violates no condition."""

    def __init__(self, model: ModelConfig, engram: EngramConfig) -> None:
        self._places = dict(enumerate(layer_places(model.num_layers, engram.layers)))
        self._carriers = carriers(engram.layers)
        self._whole: dict[str, list[NativeTensor]] = {
            "model.embed_tokens.weight": [NativeTensor("model.embed_tokens.weight", _same)],
            "model.norm.weight": [NativeTensor("model.hyper_connection_mixer.hc_norm.weight", _in_all_streams)],
        }
        head = "model.embed_tokens.weight" if not model.untie_embeddings_and_output_weights else "lm_head.weight"
        self._whole.setdefault(head, []).append(NativeTensor("lm_head.weight", _double))
        self._layer = _layer_rules(model)
        self._engram = _engram_rules(engram)
        null = [*_NULL]
        if not (model.moe.layers and model.moe.shared_expert_hidden_size):
            null.append(r"\.mlp\.shared_expert\.\w+\.weight")
        if not model.moe.layers:
            null.append(r"\.mlp\.gate\.weight")
        if not engram.conv_kernel_size:
            null.append(r"\.ple\.(conv1d|norm_conv)\.weight")
        places = "|".join(str(place) for place in self._carriers.values())
        null.append(rf"^model\.layers\.({places})\.(linear_attn|mlp|\w+_hyper_connection)\..+")
        self._null = re.compile("|".join(f"{pattern}$" for pattern in null))

    def native(self, name: str) -> list[NativeTensor]:
        """The tensors that ``name`` of the ``megamem`` architecture becomes; ExportError where there is no rule for it."""
        if name in self._whole:
            return self._whole[name]
        if match := _NUMBERED.fullmatch(name):
            layer, expert, rest = int(match["layer"]), match["expert"], match["rest"]
            if rest in self._engram and layer in self._carriers:
                target, change = self._engram[rest]
                return [NativeTensor(f"{self.carrier(layer)}.ple.{target}", change)]
            if expert is not None:
                rest = f"mlp.experts.{rest}"
            if rest in self._layer and layer in self._places:
                target, change = self._layer[rest]
                return [NativeTensor(f"model.layers.{self._places[layer]}.{target.format(expert=expert)}", change)]
        raise ExportError(f"{name} has no place in a Qwen4-Exp of the run's configuration; export the run --to megamem")

    def carrier(self, layer: int) -> str:
        """Prefix of the null layer that carries the Engram of ``layer``."""
        return f"model.layers.{self._carriers[layer]}"

    def is_null(self, name: str) -> bool:
        """Whether the tensor ``name`` of Qwen4-Exp is all zeros because the model has nothing like it."""
        return self._null.search(name) is not None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _double(tensor: Tensor) -> Tensor:
    return 2 * tensor


def _in_all_streams(tensor: Tensor) -> Tensor:
    return torch.cat([tensor] * STREAMS)


def _layer_rules(model: ModelConfig) -> dict[str, tuple[str, Change]]:
    def gated_queries(tensor: Tensor) -> Tensor:
        """Each head's query rows, and as many zero rows of its gate."""
        queries = _double(tensor).view(model.num_attention_heads, model.head_dim, tensor.shape[1])
        return torch.cat([queries, torch.zeros_like(queries)], dim=1).flatten(0, 1)

    attention: dict[str, Change] = {
        "q_proj": gated_queries,
        "k_proj": _double,
        "v_proj": _double,
        "o_proj": _double,
        "q_norm": _same,
        "k_norm": _same,
    }
    routed: dict[str, Change] = {"gate_proj": _double, "up_proj": _double, "down_proj": _same}
    return {
        "input_layernorm.weight": ("attn_hyper_connection.hc_norm.weight", _in_all_streams),
        "post_attention_layernorm.weight": ("mlp_hyper_connection.hc_norm.weight", _in_all_streams),
        **{f"self_attn.{name}.weight": (f"self_attn.{name}.weight", change) for name, change in attention.items()},
        "mlp.gate.weight": ("mlp.gate.weight", _double),
        **{f"mlp.{name}.weight": (f"mlp.experts.0.{name}.weight", change) for name, change in routed.items()},
        **{f"mlp.experts.{n}.weight": (f"mlp.experts.{{expert}}.{n}.weight", change) for n, change in routed.items()},
        **{f"mlp.shared_experts.{name}.weight": (f"mlp.shared_expert.{name}.weight", _double) for name in routed},
    }


def _engram_rules(engram: EngramConfig) -> dict[str, tuple[str, Change]]:
    def conv(tensor: Tensor) -> Tensor:
        return _in_all_streams(F.pad(tensor, (conv_taps(engram) - tensor.shape[1], 0)))[:, None]

    per_stream = ("key_proj", "norm_key", "norm_query", "norm_conv")
    return {
        **{f"engram.{name}.weight": (f"{name}.weight", _in_all_streams) for name in per_stream},
        "engram.value_proj.weight": ("value_proj.weight", _same),
        "engram.conv_weight": ("conv1d.weight", conv),
    }
