"""The model chunks of a pipeline stage."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from torch import nn


def model_chunks(stage: nn.Module) -> list[GPTModel]:
    """The models of the virtual stages in ``stage``, a ``ModuleList`` of them or one by itself, in the order of their layers."""
    return [module for module in stage.modules() if isinstance(module, GPTModel)]
