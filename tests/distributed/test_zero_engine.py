"""ZeRO on small GPTs: every layout and stage trains like one process, steps can be skipped, runs resumed bit for bit."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamem.memory.config import EngramConfig, MemoryConfig
from megamem.models.canonical import canonical_entries, gather
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.gpt import build_model
from megamem.models.micro import MicroContext
from megamem.parallel import host_adam
from megamem.parallel.groups import Groups, destroy, initialize
from megamem.parallel.layout import Layout
from megamem.parallel.zero import ZeroEngine
from megamem.testing.distributed import run_distributed
from megamem.train.config import OptimizerConfig

SEQUENCES, LENGTH, VOCABULARY = 4, 8, 50
STEPS = 3
CLIP = 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _build(
    layout: Layout,
    *,
    precision: str = "fp32",
    moe: str = "",
    sequence_parallel: bool = False,
    tied: bool = True,
    zero_stage: int = 1,
    offload: str = "none",
) -> tuple[Groups, ZeroEngine]:
    groups = initialize(layout, seed=1)
    experts = MoEConfig(
        layers=[1],
        num_experts=4,
        ffn_hidden_size=12,
        shared_expert_hidden_size=8,
        token_dispatcher=moe,  # type: ignore[arg-type]
    )
    model = ModelConfig(
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=20,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCABULARY,
        make_vocab_size_divisible_by=8,
        init_method_std=0.2,
        untie_embeddings_and_output_weights=not tied,
        moe=experts if moe else MoEConfig(),
    )
    # Without memory the Engram is skipped: its parameters get no gradient at all.
    memory = MemoryConfig(engram=EngramConfig(layers=[0], heads=2, width=4, rows_per_head=64))
    gpt = build_model(
        model,
        memory,
        groups=groups,
        seq_length=LENGTH,
        dtype=DTYPES[precision],
        seed=7,
        sequence_parallel=sequence_parallel,
    )
    engine = ZeroEngine(
        gpt,
        optimizer=OptimizerConfig(lr=1e-2, zero_stage=zero_stage, offload=offload),  # type: ignore[arg-type]
        groups=groups,
        precision=precision,  # type: ignore[arg-type]
        gradient_accumulation_steps=SEQUENCES // layout.dp,
    )
    return groups, engine


def _accumulate(engine: ZeroEngine, groups: Groups, step: int) -> None:
    """Gradients of the mean loss over the step's tokens, the same under every layout."""
    dp, count = groups.layout.dp, SEQUENCES // groups.layout.dp
    tokens = np.random.default_rng(step).integers(0, VOCABULARY, (SEQUENCES, LENGTH + 1))
    mine = torch.from_numpy(tokens[groups.coordinates.dp * count : (groups.coordinates.dp + 1) * count])

    def forward(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        row = next(iterator)[None]
        context = MicroContext(document_ids=torch.zeros(1, LENGTH, dtype=torch.int32))
        output = model(row[:, :-1], torch.arange(LENGTH)[None], None, labels=row[:, 1:], packed_seq_params=context)
        return output, lambda losses: (losses.float().sum() * dp * count / (SEQUENCES * LENGTH), {})

    engine.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(mine),
        model=[engine.module],
        num_microbatches=count,
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )


def _train(engine: ZeroEngine, groups: Groups, steps: range) -> list[float]:
    norms = []
    for step in steps:
        _accumulate(engine, groups, step)
        engine.reduce_gradients()
        norms.append(engine.grad_norm_sq())
        engine.step(1e-2 / (step + 1), min(1.0, CLIP / norms[-1] ** 0.5))
    return norms


def _masters(engine: ZeroEngine, groups: Groups) -> list[tuple[str, np.ndarray]]:
    """Master weights by canonical name, whole; the copy of a tied embedding is there under the same name."""
    result = []
    masters = {param: engine.full_state(param)["master"] for param in engine.parameters}
    for entry in canonical_entries(engine.module, groups):
        if entry.tensor in masters:
            full = gather(entry, masters[entry.tensor][entry.rows], groups)
            result.append((entry.name, full.numpy().copy()))
    return result


def train_layout(sizes: dict[str, int], **options: Any) -> tuple[list[float], list[tuple[str, np.ndarray]], bool]:
    """Train for a few steps: squared norms, whole master weights, whether the parameters are these, rounded."""
    groups, engine = _build(Layout(**sizes), **options)
    norms = _train(engine, groups, range(STEPS))
    rounded = all(torch.equal(p, engine.full_state(p)["master"].to(p.dtype)) for p in engine.parameters)
    result = norms, _masters(engine, groups), rounded
    engine.close()
    destroy()
    return result


def train_stages(sizes: dict[str, int], stages: list[dict[str, Any]], **options: Any) -> list[Any]:
    """The result of :func:`train_layout` for each of ``stages``, one after the other in the same processes."""
    return [train_layout(sizes, **options, **stage) for stage in stages]


def _world(**sizes: int) -> dict[str, int]:
    return {"world_size": sizes.pop("world_size", 1), **sizes}


@pytest.fixture(scope="module")
def one_process() -> Any:
    """Results of the one-process run of a model, computed once."""
    cache: dict[str, Any] = {}

    def get(**options: Any) -> tuple[list[float], dict[str, np.ndarray]]:
        options = {"precision": "fp32", "moe": "", "tied": True} | options
        key = repr(sorted(options.items()))
        if key not in cache:
            norms, masters, _ = run_distributed(train_layout, 1, _world(), **options)[0]
            cache[key] = norms, dict(masters)
        return cache[key]

    return get


def _check(results: list[Any], reference: tuple[list[float], dict[str, np.ndarray]], tolerance: float) -> None:
    norms, masters = reference
    seen = set()
    for rank_norms, rank_masters, rounded in results:
        assert rounded
        assert rank_norms == results[0][0], "ranks disagree about the norm"
        np.testing.assert_allclose(rank_norms, norms, rtol=tolerance)
        for name, master in rank_masters:
            seen.add(name)
            np.testing.assert_allclose(master, masters[name], atol=tolerance, err_msg=name)
    assert seen == masters.keys()


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param({"world_size": 2}, {}, id="dp2"),
        pytest.param({"world_size": 2, "tp": 2}, {}, id="tp2"),
        pytest.param({"world_size": 2, "tp": 2}, {"sequence_parallel": True}, id="tp2-sp"),
        pytest.param({"world_size": 2, "pp": 2}, {}, id="pp2-tied"),
        pytest.param({"world_size": 2, "pp": 2}, {"tied": False}, id="pp2-untied"),
    ],
)
def test_dense_layouts_train_like_one_process(one_process: Any, sizes: dict[str, int], options: dict[str, Any]) -> None:
    results = run_distributed(train_layout, sizes["world_size"], sizes, **options)
    _check(results, one_process(tied=options.get("tied", True)), 1e-5)


@pytest.mark.parametrize(
    ("sizes", "dispatcher"),
    [
        pytest.param({"world_size": 2, "ep": 2}, "allgather", id="dp2-ep2-allgather"),
        pytest.param({"world_size": 2, "ep": 2}, "alltoall", id="dp2-ep2-alltoall"),
        pytest.param({"world_size": 4, "ep": 2}, "alltoall", id="dp4-ep2"),
        pytest.param({"world_size": 4, "pp": 2, "ep": 2}, "alltoall", id="pp2-dp2-ep2"),
        pytest.param({"world_size": 4, "tp": 2, "ep": 2}, "alltoall", id="tp2-sp-dp2-ep2"),
    ],
)
def test_experts_are_averaged_over_all_tokens(one_process: Any, sizes: dict[str, int], dispatcher: str) -> None:
    results = run_distributed(
        train_layout, sizes["world_size"], sizes, moe=dispatcher, sequence_parallel=sizes.get("tp", 1) > 1
    )
    _check(results, one_process(moe="allgather"), 1e-5)


@pytest.fixture(scope="module", autouse=True)
def cpu_adam() -> None:
    """DeepSpeed's CPU Adam is compiled before ranks start: what they do has a time limit."""
    host_adam._build(announce=False)


STAGES = [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 2, "offload": "host"}]
WITH_PIPELINE = [{"zero_stage": 0}, {"zero_stage": 1, "offload": "host"}]


@pytest.mark.parametrize(
    ("sizes", "stages", "options"),
    [
        pytest.param({"world_size": 2}, STAGES, {}, id="dp2"),
        pytest.param({"world_size": 2, "pp": 2}, WITH_PIPELINE, {}, id="pp2-tied"),
        pytest.param({"world_size": 4, "tp": 2}, STAGES, {"sequence_parallel": True}, id="tp2-sp-dp2"),
        pytest.param({"world_size": 4, "ep": 2}, STAGES, {"moe": "alltoall"}, id="dp4-ep2"),
        pytest.param(
            {"world_size": 4, "tp": 2, "ep": 2},
            STAGES,
            {"moe": "allgather", "sequence_parallel": True},
            id="tp2-sp-dp2-ep2",
        ),
        pytest.param(
            {"world_size": 4, "tp": 2, "etp": 1, "ep": 2},
            [{}, *STAGES],
            {"moe": "alltoall", "sequence_parallel": True},
            id="tp2-sp-etp1-ep2",
        ),
        pytest.param({"world_size": 2}, STAGES, {"precision": "bf16"}, id="dp2-bf16"),
    ],
)
def test_every_stage_trains_like_one_process(
    one_process: Any, sizes: dict[str, int], stages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    same_model = {"precision": options.get("precision", "fp32"), "moe": "allgather" if "moe" in options else ""}
    ranks = run_distributed(train_stages, sizes["world_size"], sizes, stages, **options)
    for stage in range(len(stages)):
        _check([rank[stage] for rank in ranks], one_process(**same_model), 1e-5)


def test_bf16_data_parallel_trains_like_one_process(one_process: Any) -> None:
    """bf16 activations round differently only in the order of sums: gradients are accumulated and reduced in fp32."""
    results = run_distributed(train_layout, 2, _world(world_size=2), precision="bf16")
    _check(results, one_process(precision="bf16"), 1e-5)


def _bytes(engine: ZeroEngine) -> list[bytes]:
    return [
        value.contiguous().view(torch.uint8).numpy().tobytes()
        for param in engine.parameters
        for value in (param.detach(), *engine.full_state(param).values())
    ]


def skip_then_resume(sizes: dict[str, int], precision: str, moe: str, **stage: Any) -> dict[str, Any]:
    """Skip a step in the middle; then go on from saved state in a fresh engine, next to the engine that ran on."""
    build = partial(_build, Layout(**sizes), precision=precision, moe=moe, **stage)
    groups, engine = build()
    states = [engine.full_state(param) for param in engine.parameters]
    starts_empty = not any(state["exp_avg"].any() or state["exp_avg_sq"].any() for state in states)
    _train(engine, groups, range(2))

    before = _bytes(engine), engine.state_dict()
    _accumulate(engine, groups, 99)
    engine.reduce_gradients()
    skipped_norm = engine.grad_norm_sq()
    engine.skip()
    skipped_cleanly = before == (_bytes(engine), engine.state_dict())

    saved = [engine.full_state(param) for param in engine.parameters]
    counters = engine.state_dict()
    went_on = _train(engine, groups, range(2, 4)), _bytes(engine)
    engine.close()

    destroy()
    groups, resumed = build()
    for param, state in zip(resumed.parameters, saved, strict=True):
        resumed.load_full_state(param, state)
    resumed.load_state_dict(counters)
    restored = before == (_bytes(resumed), resumed.state_dict())
    continued = _train(resumed, groups, range(2, 4)), _bytes(resumed)
    return {
        "starts_empty": starts_empty,
        "skipped_norm": skipped_norm,
        "skipped_cleanly": skipped_cleanly,
        "restored": restored,
        "continues": went_on == continued,
        "moved": continued[1] != before[0],
        "counters": resumed.state_dict(),
    }


@pytest.mark.parametrize(
    ("sizes", "precision", "moe", "stage"),
    [
        pytest.param({"world_size": 1}, "bf16", "", {}, id="one-bf16"),
        pytest.param({"world_size": 2, "ep": 2}, "fp32", "alltoall", {}, id="dp2-ep2-fp32"),
        pytest.param({"world_size": 2}, "bf16", "", {}, id="dp2-bf16"),
        pytest.param({"world_size": 2, "pp": 2}, "bf16", "", {}, id="pp2-bf16"),
        pytest.param({"world_size": 2}, "fp32", "", {"zero_stage": 0}, id="dp2-fp32-stage0"),
        pytest.param({"world_size": 2, "ep": 2}, "fp32", "alltoall", {"zero_stage": 2}, id="dp2-ep2-fp32-stage2"),
        pytest.param({"world_size": 2}, "bf16", "", {"zero_stage": 2}, id="dp2-bf16-stage2"),
        pytest.param({"world_size": 2}, "bf16", "", {"offload": "host"}, id="dp2-bf16-host"),
        pytest.param({"world_size": 2}, "fp32", "", {"zero_stage": 2, "offload": "host"}, id="dp2-fp32-stage2-host"),
    ],
)
def test_a_skipped_step_changes_nothing_and_a_resumed_run_continues_bit_for_bit(
    sizes: dict[str, int], precision: str, moe: str, stage: dict[str, Any]
) -> None:
    for report in run_distributed(skip_then_resume, sizes["world_size"], sizes, precision, moe, **stage):
        assert report["starts_empty"]
        assert report["skipped_norm"] > 0
        assert report["skipped_cleanly"]
        assert report["restored"]
        assert report["continues"]
        assert report["moved"]
        assert report["counters"] == {"step": 4}


def norm_with_one_bad_gradient() -> list[bool]:
    """A NaN on one rank only reaches the norm of every rank, and the state stays finite when the step is skipped."""
    groups, engine = _build(Layout(world_size=2))
    _accumulate(engine, groups, 0)
    if groups.coordinates.rank == 1:
        engine.parameters[0].grad.view(-1)[3] = float("nan")  # type: ignore[union-attr]
    engine.reduce_gradients()
    bad = engine.grad_norm_sq()
    engine.skip()
    norms = _train(engine, groups, range(1))
    return [np.isnan(bad).item(), np.isfinite(norms).all().item()]


def test_a_bad_gradient_on_one_rank_is_seen_by_all() -> None:
    assert run_distributed(norm_with_one_bad_gradient, 2) == [[True, True], [True, True]]


class _Scale(torch.nn.Module):
    """Its gradient is its input."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(rows, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x.to(self.weight.dtype)).sum()


def bf16_accumulation() -> float:
    groups = initialize(Layout(), seed=1)
    engine = ZeroEngine(_Scale(1), optimizer=OptimizerConfig(), groups=groups, precision="bf16")
    engine.zero_grad()
    for gradient in [1.0] + 256 * [2.0**-9]:
        engine.module(torch.tensor([[gradient, 0.0, 0.0]])).backward()
    engine.reduce_gradients()
    return engine.grad_norm_sq()


def test_small_bf16_gradients_are_not_lost_in_accumulation() -> None:
    assert run_distributed(bf16_accumulation, 1) == [1.5**2]  # a bf16 sum stays at 1: 1 + 2 ** -9 rounds to 1


def adamw_of_both() -> list[tuple[float, float]]:
    """Norm and largest difference of parameters, step by step, of ZeroEngine and of torch's AdamW."""
    groups = initialize(Layout(), seed=1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3, bias=False))
    net[2].weight.no_weight_decay = True
    reference = copy.deepcopy(net)
    settings = OptimizerConfig(betas=(0.8, 0.9), weight_decay=0.5)
    engine = ZeroEngine(net, optimizer=settings, groups=groups, precision="fp32", gradient_accumulation_steps=2)
    adam = torch.optim.AdamW(
        [
            {"params": [reference[0].weight], "weight_decay": 0.5},
            {"params": [reference[0].bias, *reference[1].parameters(), reference[2].weight], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
    )
    report = []
    for step in range(3):
        engine.zero_grad()
        adam.zero_grad()
        for x in torch.randn(2, 4, 5):
            engine.module(x).square().sum().backward()
            reference(x).square().sum().backward()
        engine.reduce_gradients()
        squares = sum(float(p.grad.square().sum()) for p in reference.parameters())
        norm_error = abs(engine.grad_norm_sq() / squares - 1)
        engine.step(0.1 / (step + 1), 0.25)
        adam.param_groups[0]["lr"] = adam.param_groups[1]["lr"] = 0.1 / (step + 1)
        for p in reference.parameters():
            p.grad.mul_(0.25)  # type: ignore[union-attr]
        adam.step()
        pairs = zip(net.parameters(), reference.parameters(), strict=True)
        report.append((norm_error, max(float((a - b).detach().abs().max()) for a, b in pairs)))
    return report


def test_one_process_is_adamw_with_decay_on_matrices_only() -> None:
    for norm_error, difference in run_distributed(adamw_of_both, 1)[0]:
        assert norm_error < 1e-6
        assert difference < 1e-6
