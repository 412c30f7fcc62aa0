"""AdamW for optimizer states in host memory: DeepSpeed's CPU Adam, or torch's where that cannot be built."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from megamem.parallel import cpu
from megamem.parallel.groups import Groups

cpu.prepare_deepspeed()

from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: E402
from deepspeed.ops.op_builder import CPUAdamBuilder  # noqa: E402

logger = logging.getLogger(__name__)

_OTHER_BUILD_SECONDS = 600.0
"""How long another process may take to build the same extension before its lock counts as left behind."""


class HostAdam(DeepSpeedCPUAdam):
    """DeepSpeed's CPU Adam, whose result is a function of the parameters, their state and the step alone.

    As it comes, it multiplies the powers of the betas up from call to call in fp32, so that a resumed run, which starts from
    the power itself, would leave a run that went on by a rounding error.
    """

    def step(self, closure: Any = None) -> Any:
        """One step over all parameters that have a gradient."""
        first = self.defaults
        self.ds_opt_adam.destroy_adam(self.opt_id)
        self.ds_opt_adam.create_adam(
            self.opt_id,
            first["lr"],
            *first["betas"],
            first["eps"],
            first["weight_decay"],
            self.adam_w_mode,
            False,
        )
        return super().step(closure)


def create_host_adam(
    param_groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, groups: Groups
) -> tuple[torch.optim.Optimizer, str]:
    """AdamW for parameters on the CPU, the same kind on all ranks, and why it is not DeepSpeed's (empty where it is).

    Collective over the world. The first use on a machine compiles for about a minute: one rank of each node does it while
    the others wait.
    """
    problem = _agree(_build(announce=True) if _is_first_of_node() else "", groups)
    problem = problem or _agree("" if _is_first_of_node() else _build(announce=False), groups)
    if not problem:
        return HostAdam(param_groups, lr=lr, betas=betas, eps=eps), ""
    return torch.optim.AdamW(param_groups, lr=lr, betas=betas, eps=eps, fused=True), problem


def _is_first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _agree(problem: str, groups: Groups) -> str:
    """The problem of the first rank that has one."""
    problems: list[Any] = [None] * groups.layout.world_size
    dist.all_gather_object(problems, problem, group=groups.world)
    return next((text for text in problems if text), "")


def _build(*, announce: bool) -> str:
    """Compile the extension, or load what was compiled before; what went wrong, or nothing."""
    try:
        with _bundled_ninja():
            directory = Path(cpp_extension._get_build_directory(CPUAdamBuilder.NAME, False))
            _wait_for_other_build(directory / "lock", announce)
            if announce and not (directory / f"{CPUAdamBuilder.NAME}.so").exists():
                print(
                    "building DeepSpeed's CPU Adam (once per machine, about a minute)...", file=sys.stderr, flush=True
                )
            CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # a compiler can fail in any way, and training does not depend on it
        logger.debug("DeepSpeed's CPU Adam cannot be built", exc_info=True)
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"
    return ""


def _wait_for_other_build(lock: Path, announce: bool) -> None:
    """torch itself waits for ever, and silently, for a lock that a killed process has left."""
    if announce and lock.exists():
        print(
            f"waiting for another build of DeepSpeed's CPU Adam ({lock}), {_OTHER_BUILD_SECONDS:.0f} s at most; if none is "
            "running, delete that file...",
            file=sys.stderr,
            flush=True,
        )
    deadline = time.monotonic() + _OTHER_BUILD_SECONDS
    while lock.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{lock} was left by a build that did not end; delete this file to build again")
        time.sleep(0.1)


@contextlib.contextmanager
def _bundled_ninja() -> Iterator[None]:
    """The ninja that is installed with DeepSpeed on the path, which an interpreter that is not activated lacks."""
    import ninja

    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join(filter(None, (path, ninja.BIN_DIR)))
    try:
        yield
    finally:
        os.environ["PATH"] = path
