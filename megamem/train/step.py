"""One pass over a step batch: micro-batches through megatron-core's schedule, with the step's memory at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megamem.batch import MicroBatch, StepBatch
from megamem.memory.step import StepMemory
from megamem.models.chunks import model_chunks
from megamem.models.micro import MicroContext
from megamem.observe.phases import ScheduleTimers, phases
from megamem.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class StepLoss:
    """What a pass measured, equal on every rank."""

    loss: float
    """Mean over the counted tokens of the global batch, in nats."""
    tokens: int
    """Counted tokens of the global batch."""


@dataclass(frozen=True, slots=True)
class _DeviceMicroBatch:
    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    context: MicroContext


class StepRunner:
    """Runs forward (and backward) over all micro-batches of a step, on this rank's pipeline stage: ``model`` is its model, or
    the ``ModuleList`` of its chunks."""

    def __init__(self, model: torch.nn.Module, groups: Groups, *, seq_length: int, micro_batch_size: int) -> None:
        self.model = model
        self._chunks = model_chunks(model)
        self.groups = groups
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self._schedule = get_forward_backward_func()
        for chunk in self._chunks:
            get_model_config(chunk).timers = ScheduleTimers(phases)

    def run(self, batch: StepBatch, memory: StepMemory | None, *, train: bool) -> StepLoss:
        """Forward over ``batch``, and backward when ``train``: gradients accumulate in parameters and working sets.

        ``memory`` None blocks every memory: modules that look rows up pass the residual through.
        """
        with phases("control"):
            tokens = int(self._world_sum(batch.loss_tokens if self._counts else 0.0))
        count = len(batch.micro_batches)
        # The schedule divides by the number of micro-batches and multiplies by the context-parallel size; the engines divide
        # by the data- times the context-parallel size.
        scale = count * self.groups.layout.dp / max(tokens, 1)
        losses: list[torch.Tensor] = []
        forward = partial(self._forward, scale=scale, losses=losses)
        self.model.train(train)
        with torch.set_grad_enabled(train):
            self._schedule(
                forward_step_func=forward,
                data_iterator=list(tee(self._to_device(batch, memory), len(self._chunks))),
                model=self._chunks,
                num_microbatches=count,
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
                forward_only=not train,
            )
        # Summed on the device, read once: no synchronisation per micro-batch.
        local = float(torch.stack(losses).sum()) if losses and self.groups.coordinates.tp == 0 else 0.0
        # Stages end one after the other: those that are done wait here for the first.
        with phases("pipeline_wait" if self.groups.layout.pp > 1 else "control"):
            return StepLoss(loss=self._world_sum(local) / max(tokens, 1), tokens=tokens)

    @property
    def _counts(self) -> bool:
        """Whether this rank speaks for its data-parallel rank in sums over the world."""
        return self.groups.coordinates.slice == 0 and self.groups.coordinates.pp == 0

    def _world_sum(self, value: float) -> float:
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def _to_device(self, batch: StepBatch, memory: StepMemory | None) -> Iterator[_DeviceMicroBatch]:
        for index, micro in enumerate(batch.micro_batches):
            yield self._micro(micro, memory, index)

    def _micro(self, micro: MicroBatch, memory: StepMemory | None, index: int) -> _DeviceMicroBatch:
        device, rows = self.groups.device, None if memory is None else memory.micro(index)
        parts = self.groups.layout.cp
        context = MicroContext.from_batch(micro, device, rows, part=self.groups.coordinates.cp, parts=parts)
        positions = context.positions

        def put(array: Any) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return _DeviceMicroBatch(
            tokens=put(micro.tokens[:, positions]),
            labels=put(micro.labels[:, positions]),
            position_ids=torch.arange(positions.start, positions.stop, device=device).expand(len(micro.tokens), -1),
            loss_mask=put(micro.loss_mask[:, positions]),
            context=context,
        )

    def _forward(
        self, data: Iterator[_DeviceMicroBatch], model: torch.nn.Module, *, scale: float, losses: list[torch.Tensor]
    ) -> tuple[torch.Tensor, Any]:
        micro = next(data)
        output = model(micro.tokens, micro.position_ids, None, labels=micro.labels, packed_seq_params=micro.context)

        def loss(per_token: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            total = (per_token.float() * micro.loss_mask).sum()
            losses.append(total.detach())
            return total * scale, {}

        return output, loss
