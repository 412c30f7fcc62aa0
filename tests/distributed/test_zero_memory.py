"""What ZeRO's stages and offload keep where: gradients of stage 2 in partitions, states in host memory, Adam of either kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamem.parallel import host_adam
from megamem.parallel.groups import destroy, initialize
from megamem.parallel.layout import Layout
from megamem.parallel.zero import ZeroEngine
from megamem.testing.distributed import run_distributed
from megamem.train.config import OptimizerConfig

STEPS = 5


def _engine(stage: int = 1, offload: str = "none", precision: str = "fp32") -> ZeroEngine:
    groups = initialize(Layout(dist.get_world_size()), seed=1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in [(5, 7), (7, 11), (11, 7), (7, 5), (5, 3)]))
    settings = OptimizerConfig(zero_stage=stage, offload=offload, weight_decay=0.5)  # type: ignore[arg-type]
    return ZeroEngine(net, optimizer=settings, groups=groups, precision=precision)  # type: ignore[arg-type]


def _backward(engine: ZeroEngine, seed: int) -> None:
    dtype = engine.parameters[0].dtype
    inputs = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed + 1000 * dist.get_rank())).to(dtype)
    engine.zero_grad()
    for micro in inputs:
        engine.module(micro).square().sum().backward()


def _storages(tensors: Any) -> int:
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values()
    )


def live_bytes(stage: int, precision: str) -> tuple[dict[str, int], dict[str, int]]:
    """What the engine says, and the storages of the tensors themselves, between the last backward and the reduction."""
    engine = _engine(stage, precision=precision)
    _backward(engine, 0)
    engine.module(torch.zeros(1, 5, dtype=engine.parameters[0].dtype))  # the next forward ends the backward pass
    zero = engine._zero
    kept = [t for p in engine.parameters for t in (p.grad, p.grad_accum)]  # type: ignore[attr-defined]
    for group in range(len(zero.bit16_groups)):
        kept += zero.averaged_gradients.get(group) or []
        kept += zero.all_grad_tensors.get(group) or []
    states = [state[key] for state in zero.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq", "step")]
    live = {
        "parameters_host": _storages(engine.parameters),
        "gradients_host": _storages(kept),
        "optimizer_host": _storages([*zero.single_partition_of_fp32_groups, *states]),
    }
    engine.reduce_gradients()
    assert engine.grad_norm_sq() > 0
    return engine.memory(), live


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_what_live_tensors_hold_and_stage_2_keeps_a_partition_of_the_gradients(precision: str) -> None:
    gradients = {}
    for stage in (1, 2):
        for told, live in run_distributed(live_bytes, 4, stage, precision):
            assert {key: told[key] for key in live} == live
            gradients[stage] = max(gradients.get(stage, 0), live["gradients_host"])
    # A quarter and padding; in fp32 DeepSpeed keeps whole what a partition cuts, which is much of so small a net.
    assert gradients[2] <= gradients[1] * (0.3 if precision == "bf16" else 0.65)


def train_and_swap(offload: str) -> dict[str, Any]:
    """Train ``STEPS`` steps, move the state to the other kind of engine, train one more on both."""

    def train(engine: ZeroEngine, steps: range) -> list[torch.Tensor]:
        for step in steps:
            _backward(engine, step)
            engine.reduce_gradients()
            engine.step(0.1 / (step + 1), 0.5)
        return [p.detach().clone() for p in engine.parameters]

    engine = _engine(offload=offload)
    trained = train(engine, range(STEPS))
    kind, notice, where = type(engine._zero.optimizer).__name__, engine.notice, engine.memory()
    state, counters = [engine.full_state(p) for p in engine.parameters], engine.state_dict()
    went_on = train(engine, range(STEPS, STEPS + 1))
    engine.close()
    destroy()
    other = _engine(offload="none" if offload == "host" else "host")
    for param, values in zip(other.parameters, state, strict=True):
        other.load_full_state(param, values)
    other.load_state_dict(counters)
    swapped = train(other, range(STEPS, STEPS + 1))
    destroy()
    return {"kind": kind, "notice": notice, "memory": where, "trained": trained, "went_on": went_on, "swapped": swapped}


def _close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=1e-6) for x, y in zip(a, b, strict=True))


def test_host_adam_steps_like_fused_adamw_and_states_move_between_them() -> None:
    device, host = (run_distributed(train_and_swap, 2, offload) for offload in ("none", "host"))
    for near, far in zip(device, host, strict=True):
        assert (near["kind"], near["notice"]) == ("AdamW", "")
        assert far["kind"] == ("AdamW" if far["notice"] else "HostAdam")
        assert _close(near["trained"], far["trained"])
        for run in (near, far):
            assert _close(run["went_on"], run["swapped"])
            assert not _close(run["went_on"], run["trained"])
        assert far["memory"]["buffers_host"] > near["memory"]["buffers_host"]


def train_without_compiler(folder: Path) -> dict[str, Any]:
    os.environ.update(PATH="", TORCH_EXTENSIONS_DIR=str(folder), CXX=str(folder / "no-compiler"))
    return train_and_swap("host")


def test_without_a_compiler_torch_steps_the_host_states(tmp_path: Path) -> None:
    expected = run_distributed(train_and_swap, 2, "none")
    for found, near in zip(run_distributed(train_without_compiler, 2, tmp_path), expected, strict=True):
        assert found["kind"] == "AdamW"
        assert "DeepSpeed's CPU Adam cannot be built here" in found["notice"]
        assert _close(found["trained"], near["trained"])


def test_a_lock_that_a_killed_build_left_is_told_of_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(host_adam, "_OTHER_BUILD_SECONDS", 0.2)
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    problem = host_adam._build(announce=True)
    assert f"waiting for another build of DeepSpeed's CPU Adam ({lock})" in capsys.readouterr().err
    assert problem == f"TimeoutError: {lock} was left by a build that did not end; delete this file to build again"
    assert "waiting" not in host_adam._build(announce=False) + capsys.readouterr().err


class _Halves(torch.nn.Module):
    """The second half is left out on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) if dist.get_rank() else self.second(self.first(x))


def lack_a_gradient(sizes: dict[str, int]) -> str:
    groups = initialize(Layout(**sizes), seed=1)  # type: ignore[arg-type]
    engine = ZeroEngine(_Halves(), optimizer=OptimizerConfig(zero_stage=2), groups=groups, precision="fp32")
    for _ in range(2):
        engine.module(torch.ones(3, 4)).sum().backward()
    try:
        engine.reduce_gradients()
        return ""
    except RuntimeError as error:
        return str(error)


def test_stage_2_refuses_a_gradient_that_some_ranks_lack_where_other_groups_send_too() -> None:
    for refusal in run_distributed(lack_a_gradient, 2, {"world_size": 2, "cp": 2}):
        assert refusal.startswith("second.bias got a gradient on some ranks only")
    assert run_distributed(lack_a_gradient, 2, {"world_size": 2}) == ["", ""]


def groups_of_engines(stage: int) -> list[int]:
    """Process groups that there are with an engine and after its end, for two engines of the same ranks."""
    groups = initialize(Layout(dist.get_world_size()), seed=1)
    counts = []
    for _ in range(2):
        engine = ZeroEngine(
            torch.nn.Linear(3, 3), optimizer=OptimizerConfig(zero_stage=stage), groups=groups, precision="fp32"
        )
        counts.append(len(dist.distributed_c10d._world.pg_map))
        engine.close()
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def test_stage_0_leaves_no_process_group_behind() -> None:
    for first, after_first, second, after_second in run_distributed(groups_of_engines, 2, 0):
        assert first == second == after_first + 1 == after_second + 1
