"""Initial weights that do not depend on the layout."""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.models.gpt import GPTModel

from megamem.models.canonical import CanonicalEntry, canonical_entries, global_shape, shard
from megamem.models.config import ModelConfig
from megamem.parallel.groups import Groups


@torch.no_grad()
def initialize_weights(model: GPTModel, config: ModelConfig, groups: Groups, *, seed: int) -> None:
    """Fill every tensor of this rank's stage: a constant or ``N(0, std)``.

    Each canonical tensor is drawn whole, in fp32 and on the CPU, from a generator of its own that is seeded by ``seed``
    and the canonical name; the rank keeps its shard. So every layout, dtype and device starts from the same numbers.
    """
    for entry in canonical_entries(model, groups):
        std = _std(entry, config)
        if std == 0:
            entry.local.fill_(getattr(entry.tensor, "init_value", 0.0))
            continue
        generator = torch.Generator().manual_seed(_seed(seed, entry.name))
        full = torch.empty(global_shape(entry, groups), dtype=torch.float32)
        entry.local.copy_(shard(entry, full.normal_(0, std, generator=generator), groups))


def _std(entry: CanonicalEntry, config: ModelConfig) -> float:
    """``param.init_std`` where it is set; zero for vectors (norms, which start at ``param.init_value``, and expert biases).

    The matrices that write into the residual stream get less, by the square root of how many do (GPT-2, section 2.3).
    """
    override = getattr(entry.tensor, "init_std", None)
    if override is not None:
        return override
    if entry.tensor.ndim < 2:
        return 0.0
    if entry.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.init_method_std / math.sqrt(2 * config.num_layers)
    return config.init_method_std


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"weights/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # 63 bits: what torch takes as a seed
