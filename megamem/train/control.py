"""Requests to a training loop from outside: save now, or save and stop, at the same step on every rank."""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.distributed as dist


class Request(IntEnum):
    """What a training loop is asked to do after the step that is under way; the larger one wins."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint and go on."""
    STOP = 2
    """Write a checkpoint and end."""


def agree(request: Request) -> Request:
    """The largest request of any rank. Collective over the world."""
    value = torch.tensor([int(request)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return Request(int(value))
