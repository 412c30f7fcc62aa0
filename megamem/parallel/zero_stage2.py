"""ZeRO-2 (arXiv 1910.02054, section 5.2) under a schedule that calls backward itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megamem.parallel.groups import Groups


class GradientStream:
    """Feeds gradients into DeepSpeed's reduction as backward produces them, so that each rank keeps only its partition.

    DeepSpeed's hooks end a backward pass only where its own engine began it, and reduce in the order in which autograd ends
    gradients, which ranks share only while their graphs are alike. Here every pass reduces all parameters in one order (from
    the last layer to the first, as backward goes): a gradient waits for those before it, and one that all ranks lack counts
    as zero. A pass ends when the next forward begins, or with :meth:`finish`.

    Replicas of a parameter must all have its gradient or all lack it wherever backward has collectives of other groups as well:
    a rank that lacks it goes on to the next of those, while the others wait for it in a reduction. No model here is like that,
    and :meth:`check_alike` tells of one that is, unless it hangs first.

    Args:
        module: Where a forward pass begins; exactly one backward pass must lie between two of them.
        zero: DeepSpeed's optimizer of stage 2, whose hooks are removed.
    """

    def __init__(self, module: nn.Module, zero: Any) -> None:
        self._zero = zero
        for hook in zero._grad_acc_hooks:
            hook.remove()
        self._names = {param: name for name, param in module.named_parameters()}
        group_of = {param: index for index, group in enumerate(zero.bit16_groups) for param in group}
        self._order = [
            (param, group_of[param]) for param in reversed(_unique(module.parameters())) if param in group_of
        ]
        self._handles = [param.register_post_accumulate_grad_hook(self._on_gradient) for param, _ in self._order]
        self._handles += [chunk.register_forward_pre_hook(self._on_forward) for chunk in _chunks(module)]
        self._lacked = [0] * len(self._order)
        self.reset()

    def reset(self) -> None:
        """Forget an unfinished pass."""
        self._next = 0
        self._ready: set[torch.Tensor] = set()
        self._running = False
        self._zero.set_gradient_accumulation_boundary(False)

    def finish(self) -> None:
        """End the backward pass under way: what is not reduced yet is, and added to this rank's partition. Collective."""
        if not self._running:
            return
        for index, (param, _) in enumerate(self._order[self._next :], self._next):
            if param.grad is None:
                param.grad = torch.zeros_like(param)
                self._lacked[index] += 1
            self._ready.add(param)
        self._reduce_ready()
        self._zero.overlapping_partition_gradients_reduce_epilogue()
        self.reset()

    def check_alike(self, groups: Groups) -> None:
        """RuntimeError where replicas differed in a gradient that some lacked since the last check. Collective."""
        lacked = torch.tensor(self._lacked, device=groups.device)
        self._lacked = [0] * len(self._order)
        most = torch.stack((lacked, -lacked))
        dist.all_reduce(most, dist.ReduceOp.MAX, group=groups.dp_cp)
        for index in (most[0] != -most[1]).nonzero().flatten().tolist():
            raise RuntimeError(
                f"{self._names[self._order[index][0]]} got a gradient on some ranks only, which stage 2 cannot wait for "
                "between the messages of other groups"
            )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _on_forward(self, *unused: Any) -> None:
        self.finish()

    def _on_gradient(self, param: torch.Tensor) -> None:
        if param in self._ready:
            raise RuntimeError("a parameter got a gradient twice in one backward pass, after its first one was reduced")
        self._running = True
        self._ready.add(param)
        self._reduce_ready()

    def _reduce_ready(self) -> None:
        self._zero.setup_buckets()
        while self._next < len(self._order) and self._order[self._next][0] in self._ready:
            self._zero.reduce_ready_partitions_and_remove_grads(*self._order[self._next])
            self._next += 1


def _unique(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list(dict.fromkeys(params))


def _chunks(module: nn.Module) -> list[nn.Module]:
    """Modules that the schedule calls: a list of chunks is not called itself."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]
