from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megamem.memory.config import RowOptimizerConfig
from megamem.memory.optimizers import ROW_OPTIMIZERS, build_row_optimizer
from megamem.memory.table import InitSegment, OwnedTable, TableSpec
from megamem_kernels.row_update import op as row_update_op
from megamem_kernels.row_update import reference as row_update_reference
from megamem_kernels.segment_sum import reference as segment_sum_reference
from megamem_kernels.segment_sum import segment_sum


def make_table(name: str, rows: int, width: int, **options: Any) -> tuple[Any, OwnedTable]:
    optimizer = build_row_optimizer(RowOptimizerConfig(name=name, **options))
    table = OwnedTable.create(TableSpec("t", rows, width, (InitSegment(width, 1.0),)), seed=0)
    table.state = {spec.name: spec.allocate(table) for spec in optimizer.state}
    return optimizer, table


def gradient(step: int, rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 3 - 2)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lazy_adam_is_dense_adam_where_every_row_is_touched(weight_decay: float) -> None:
    optimizer, table = make_table("lazy_adam", 13, 5, betas=(0.9, 0.99), weight_decay=weight_decay)
    dense = torch.nn.Parameter(table.rows.clone())
    adamw = torch.optim.AdamW([dense], lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    for step in range(1, 21):
        dense.grad = gradient(step, 13, 5)
        adamw.step()
        order = torch.randperm(13, generator=torch.Generator().manual_seed(step))
        optimizer.update(table, order, gradient(step, 13, 5)[order], lr=0.05, step=step)
    torch.testing.assert_close(table.rows, dense.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table.state["exp_avg_sq"], adamw.state[dense]["exp_avg_sq"], rtol=1e-5, atol=1e-12)


def test_lazy_adam_with_gaps_has_the_moments_and_the_move_of_dense_adam() -> None:
    optimizer, table = make_table("lazy_adam", 1, 4, betas=(0.9, 0.99))
    dense = torch.nn.Parameter(table.rows.clone())
    adam = torch.optim.Adam([dense], lr=0.05, betas=(0.9, 0.99), eps=1e-8)
    for step in range(1, 31):
        touched = step in (3, 4, 11, 30)
        dense_before, lazy_before = dense.detach().clone(), table.rows.clone()
        dense.grad = gradient(step, 1, 4) if touched else torch.zeros(1, 4)
        adam.step()
        if touched:
            optimizer.update(table, torch.tensor([0]), gradient(step, 1, 4), lr=0.05, step=step)
            torch.testing.assert_close(table.state["exp_avg"], adam.state[dense]["exp_avg"], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(table.state["exp_avg_sq"], adam.state[dense]["exp_avg_sq"], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(table.rows - lazy_before, dense.detach() - dense_before, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(table.rows, dense.detach())  # dense Adam also moved in the steps without a gradient


def test_rowwise_adagrad_follows_its_formula() -> None:
    optimizer, table = make_table("rowwise_adagrad", 3, 4, epsilon=1e-6, weight_decay=0.01)
    expected, accumulated = table.rows[1].tolist(), 0.0
    untouched = table.rows[[0, 2]].clone()
    for step in (1, 4, 5):
        g = gradient(step, 1, 4)
        optimizer.update(table, torch.tensor([1]), g, lr=0.3, step=step)
        accumulated += sum(x * x for x in g[0].tolist()) / 4
        for i, x in enumerate(g[0].tolist()):
            expected[i] = expected[i] * (1 - 0.3 * 0.01) - 0.3 * x / (math.sqrt(accumulated) + 1e-6)
    torch.testing.assert_close(table.rows[1], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert table.state["accumulator"].tolist() == pytest.approx([0.0, accumulated, 0.0])
    assert torch.equal(table.rows[[0, 2]], untouched)


@pytest.mark.parametrize("name", sorted(ROW_OPTIMIZERS))
def test_untouched_rows_and_their_state_keep_their_bytes(name: str) -> None:
    optimizer, table = make_table(name, 9, 3, weight_decay=0.5)
    everything = torch.arange(9)
    optimizer.update(table, everything, gradient(1, 9, 3), lr=0.1, step=1)
    before = {key: tensor.clone() for key, tensor in {"rows": table.rows, **table.state}.items()}
    optimizer.update(table, torch.tensor([7, 2]), gradient(2, 2, 3), lr=0.1, step=2)
    optimizer.update(table, torch.empty(0, dtype=torch.int64), torch.empty(0, 3), lr=0.1, step=3)
    rest = torch.tensor([0, 1, 3, 4, 5, 6, 8])
    for key, tensor in {"rows": table.rows, **table.state}.items():
        assert torch.equal(tensor[rest], before[key][rest])
        assert not torch.equal(tensor[[2, 7]], before[key][[2, 7]])


@pytest.mark.parametrize("block_elements", [1, 7, 1 << 15])
@pytest.mark.parametrize("width", [1, 3])
def test_ops_equal_their_references(monkeypatch: pytest.MonkeyPatch, block_elements: int, width: int) -> None:
    monkeypatch.setattr(row_update_op, "BLOCK_ELEMENTS", block_elements)
    settings = {"lr": 0.1, "epsilon": 1e-8, "weight_decay": 0.1}
    results = []
    for module in (row_update_op, row_update_reference):
        state = [gradient(0, 11, width), torch.zeros(11), torch.zeros(11, width), torch.zeros(11, width)]
        last_step = torch.zeros(11, dtype=torch.int32)
        adam_rows = state[0].clone()
        for step, index in ((1, [3, 10, 0]), (2, [3]), (7, [5, 3, 10, 1])):
            g, rows = gradient(step, len(index), width), torch.tensor(index)
            module.rowwise_adagrad_(state[0], state[1], rows, g, **settings)
            module.lazy_adam_(
                adam_rows, state[2], state[3], last_step, rows, g, beta1=0.9, beta2=0.95, step=step, **settings
            )
        results.append([*state, adam_rows, last_step])
    for fast, reference in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-6, atol=1e-6)


def test_lazy_adam_refuses_to_repeat_a_step() -> None:
    optimizer, table = make_table("lazy_adam", 4, 2)
    optimizer.update(table, torch.tensor([1]), torch.ones(1, 2), lr=0.1, step=5)
    with pytest.raises(ValueError, match=r"step 5 is not later than the last update of a row \(step 5\)"):
        optimizer.update(table, torch.tensor([0, 1]), torch.ones(2, 2), lr=0.1, step=5)


@pytest.mark.parametrize("threads", [1, 2])
def test_segment_sum_adds_in_order(threads: int) -> None:
    values = torch.randn(997, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 997)[:, None]
    segment = torch.randint(0, 50, (997,), generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(segment_sum(values, segment, 60), segment_sum_reference.segment_sum(values, segment, 60))
    finally:
        torch.set_num_threads(before)
    assert segment_sum(values[:0], segment[:0], 2).tolist() == torch.zeros(2, 33).tolist()
