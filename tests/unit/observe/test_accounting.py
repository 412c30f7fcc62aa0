"""Memory accounting: the estimate of activations against what autograd keeps, pipeline arithmetic, the printed table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from megamem.memory.config import BankConfig, EngramConfig, MemoryConfig
from megamem.memory.spec import InitSegment, TableSpec
from megamem.models.config import ModelConfig, MoEConfig
from megamem.models.gpt import build_model
from megamem.models.micro import MicroContext
from megamem.observe.accounting import Work, account, activation_bytes, largest, render, totals, working_set_bytes
from megamem.parallel.groups import destroy, init_distributed, initialize
from megamem.parallel.layout import Layout

DENSE = ModelConfig(
    num_layers=4, hidden_size=48, ffn_hidden_size=136, num_attention_heads=6, num_query_groups=2, vocab_size=300
)
EXPERTS = replace(DENSE, moe=MoEConfig(layers=[1, 3], num_experts=4, ffn_hidden_size=40, shared_expert_hidden_size=24))
WORK = Work(
    seq_length=40,
    micro_batch_size=3,
    micro_batches=8,
    element_bytes=4,
    sequence_parallel=False,
    recompute="none",
    device="cpu",
    attention="sdpa",
)


def saved_bytes(model: ModelConfig, work: Work, documents: int) -> int:
    """Storage that autograd keeps between forward and backward of one micro-batch of ``documents`` per sequence, parameters
    left out."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[work.element_bytes]
    b, s = work.micro_batch_size, work.seq_length
    init_distributed()
    groups = initialize(Layout(), seed=1)
    gpt = build_model(
        model, MemoryConfig(), groups=groups, seq_length=s, dtype=dtype, seed=1, sequence_parallel=False
    ).to(dtype)
    own = {param.untyped_storage().data_ptr() for param in gpt.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 300, (b, s + 1), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(b * documents, dtype=torch.int32).repeat_interleave(s // documents).view(b, s)
    context = MicroContext(document_ids=ids)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = gpt(tokens[:, :-1], torch.arange(s).expand(b, s), None, labels=tokens[:, 1:], packed_seq_params=context)
    assert loss.requires_grad
    destroy()
    dist.destroy_process_group()
    return sum(seen.values())


LONG = {"seq_length": 512, "micro_batch_size": 1}


@pytest.mark.parametrize(
    ("model", "changes", "documents"),
    [
        pytest.param(DENSE, {}, 1, id="dense-fp32"),
        pytest.param(DENSE, {"element_bytes": 2}, 2, id="dense-bf16"),
        pytest.param(EXPERTS, {}, 4, id="experts-fp32"),
        pytest.param(DENSE, LONG, 4, id="dense-fp32-long-packed"),
        pytest.param(DENSE, LONG | {"element_bytes": 2}, 2, id="dense-bf16-long-packed"),
    ],
)
def test_activation_estimate_is_near_what_autograd_keeps(
    model: ModelConfig, changes: dict[str, int], documents: int
) -> None:
    work = replace(WORK, **changes)  # type: ignore[arg-type]
    estimate = activation_bytes(work, model, MemoryConfig(), Layout(), 0)
    # torch's norms on the CPU keep a second fp32 copy, which its fused ones do not.
    assert 0.75 < estimate / saved_bytes(model, work, documents) < 1.05


def test_the_mask_of_packed_documents_counts_once_for_each_micro_batch_under_way() -> None:
    def mask(layout: Layout, stage: int = 0, micro_batches: int = 8) -> float:
        """In masks of one micro-batch."""
        work = replace(WORK, micro_batches=micro_batches)
        sdpa, flash = (
            activation_bytes(replace(work, attention=backend), DENSE, MemoryConfig(), layout, stage)
            for backend in ("sdpa", "flash")
        )
        return (sdpa - flash) / (3 * 40 * 40 * 4)

    assert mask(Layout()) == 1
    assert mask(Layout(2, cp=2)) == 0.5
    assert [mask(Layout(4, pp=4), stage) for stage in range(4)] == [4, 3, 2, 1]
    assert mask(Layout(4, pp=4), micro_batches=2) == 2
    assert mask(Layout(2, pp=2, vpp=2)) == 4


def test_full_recompute_rebuilds_one_layer_at_a_time_however_many_micro_batches_are_under_way() -> None:
    def full(layout: Layout, micro_batches: int = 8) -> int:
        work = replace(WORK, recompute="full", micro_batches=micro_batches, attention="flash")
        return activation_bytes(work, DENSE, MemoryConfig(), layout, 0)

    stream = 3 * 40 * 48 * 4  # of one layer and one micro-batch
    one = full(Layout(4, pp=4), micro_batches=1) - stream
    assert full(Layout(4, pp=4)) == 4 * stream + one
    assert full(Layout(2, pp=2)) == 2 * 2 * stream + one
    assert full(Layout(2, pp=2, vpp=2)) == 5 * stream + one
    without = replace(WORK, micro_batches=1, attention="flash")
    assert one == activation_bytes(without, DENSE, MemoryConfig(), Layout(4, pp=4), 0)


def test_a_bank_keeps_the_blocks_of_its_documents() -> None:
    def bank(**changes: object) -> int:
        work = replace(WORK, **changes)  # type: ignore[arg-type]
        memories = (MemoryConfig(bank=BankConfig(units=units, layers=[2])) for units in ([], [5, 0, 3]))
        without, having = (activation_bytes(work, DENSE, memory, Layout(), 0) for memory in memories)
        return having - without

    blocks = 2 * 3 * (3 * 8 * 48) * 4  # two documents in each of three sequences
    tokens = 3 * 40 * (5 * 8 + 48) * 4
    assert bank() == tokens + blocks
    assert bank(seq_length=80) == 2 * tokens + blocks
    assert bank(recompute="selective") == 3 * 40 * 48 * 4


def test_activations_shrink_with_what_shares_them() -> None:
    memory = MemoryConfig(engram=EngramConfig(layers=[1], heads=2, width=4))
    wide = replace(DENSE, num_attention_heads=8, num_query_groups=8, kv_channels=8)

    def estimate(layout: Layout, memory: MemoryConfig = memory, **changes: object) -> int:
        work = replace(WORK, attention="flash", **changes)  # type: ignore[arg-type]
        return activation_bytes(work, wide, memory, layout, 0)

    alone = estimate(Layout())
    tp = estimate(Layout(2, tp=2))
    assert alone / 2 < tp < alone
    assert estimate(Layout(2, tp=2), sequence_parallel=True) == pytest.approx(alone / 2, rel=1e-6)
    assert alone / 2 < estimate(Layout(2, cp=2)) < alone
    assert estimate(Layout(), recompute="full") < estimate(Layout(), recompute="selective") < alone
    # The first of two stages keeps two micro-batches of half the layers; interleaved, five halves of that.
    plain = MemoryConfig()
    stage = estimate(Layout(2, pp=2), plain, micro_batches=1)
    assert estimate(Layout(2, pp=2), plain) == pytest.approx(2 * stage, rel=1e-6)
    assert estimate(Layout(2, pp=2, vpp=2), plain) == pytest.approx(5 / 2 * stage, rel=1e-6)


@dataclass(frozen=True)
class _Table:
    spec: TableSpec
    held: dict[str, int]

    def resident_bytes(self) -> dict[str, int]:
        return self.held


def test_account_adds_tables_working_sets_and_dense_parts() -> None:
    memory = MemoryConfig(engram=EngramConfig(layers=[1], orders=[2, 3], heads=2, width=4), prefetch_depth=2)
    engram = TableSpec("decoder.layers.1.engram.table", 10**6, 4, init=(InitSegment(4, std=0.0),))
    held = account(
        WORK,
        model=DENSE,
        memory=memory,
        layout=Layout(),
        stage=0,
        dense={"parameters_host": 10, "buffers_host": 1},
        tables=[_Table(engram, {"host": 5, "disk": 7})],
    )
    # Rows of three steps and gradients of one, each for 2 orders x 2 heads of 8 x 3 x 40 tokens.
    rows = working_set_bytes(engram, WORK, memory, Layout())
    assert rows == (3 + 1) * (2 * 2) * (8 * 3 * 40) * 4 * 4
    assert held["buffers_host"] == 1 + rows
    assert (held["tables_host"], held["tables_disk"], held["parameters_host"]) == (5, 7, 10)
    assert totals(held) == {"host": sum(held.values()) - 7, "disk": 7}
    few = replace(engram, rows=11)
    assert working_set_bytes(few, WORK, memory, Layout()) == (3 + 1) * 11 * 4 * 4


def test_the_table_shows_this_rank_and_the_most_of_any() -> None:
    ranks = [{"parameters_device": 2**20, "optimizer_host": 2**30}, {"parameters_device": 3 * 2**20, "buffers_host": 4}]
    most = largest(ranks)
    assert most == {"buffers_host": 4, "optimizer_host": 2**30, "parameters_device": 3 * 2**20}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(ranks[0], most, most_total=largest([totals(rank) for rank in ranks])))
    lines = {tuple(line.split()[:2]): line for line in console.export_text().splitlines() if line.strip()}
    assert "1 MiB" in lines["parameters", "device"] and "3 MiB" in lines["parameters", "device"]
    assert "1 GiB" in lines["optimizer", "host"]
    assert "buffers (partly estimate)" in lines["buffers", "(partly"]
    assert "3 MiB" in lines["total", "device"] and "1 GiB" in lines["total", "host"]
