from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megamem.memory.config import RowOptimizerConfig, StorageConfig
from megamem.memory.optimizers import ROW_OPTIMIZERS, RowOptimizer, build_row_optimizer, sinkhorn_scales
from megamem.memory.placement import Placement
from megamem.memory.spec import InitSegment, TableSpec
from megamem.memory.table import OwnedTable
from megamem_kernels import parallel
from megamem_kernels.sinkhorn import column_maxima, column_squares, reference, row_norms


def make_table(
    name: str, rows: int, width: int, *, format: str = "fp32", placement: str = "contiguous", **options: Any
) -> tuple[RowOptimizer, OwnedTable]:
    optimizer = build_row_optimizer(RowOptimizerConfig(name=name, **options))
    table = OwnedTable.create(
        TableSpec("t", rows, width, (InitSegment(width, 1.0),)),
        seed=0,
        placement=Placement(placement, rows),
        storage=StorageConfig(format=format),
        state_fields=optimizer.state_fields(width),
    )
    return optimizer, table


def gradient(step: int, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 3 - 2)


def contents(table: OwnedTable) -> dict[str, Tensor]:
    return table.read(table.start, table.stop)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lazy_adam_is_dense_adam_where_every_row_is_touched(weight_decay: float) -> None:
    optimizer, table = make_table("lazy_adam", 13, 5, betas=(0.9, 0.99), weight_decay=weight_decay)
    dense = torch.nn.Parameter(contents(table)["rows"])
    adamw = torch.optim.AdamW([dense], lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    for step in range(1, 21):
        dense.grad = gradient(step, 13, 5)
        adamw.step()
        order = torch.randperm(13, generator=torch.Generator().manual_seed(step))
        optimizer.update(table, order.numpy(), gradient(step, 13, 5)[order], lr=0.05, step=step)
    found = contents(table)
    torch.testing.assert_close(found["rows"], dense.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["state.exp_avg_sq"], adamw.state[dense]["exp_avg_sq"], rtol=1e-5, atol=1e-12)


def test_lazy_adam_with_gaps_has_the_moments_and_the_move_of_dense_adam() -> None:
    optimizer, table = make_table("lazy_adam", 1, 4, betas=(0.9, 0.99))
    dense = torch.nn.Parameter(contents(table)["rows"])
    adam = torch.optim.Adam([dense], lr=0.05, betas=(0.9, 0.99), eps=1e-8)
    for step in range(1, 31):
        touched = step in (3, 4, 11, 30)
        dense_before, lazy_before = dense.detach().clone(), contents(table)["rows"]
        dense.grad = gradient(step, 1, 4) if touched else torch.zeros(1, 4)
        adam.step()
        if touched:
            optimizer.update(table, np.array([0]), gradient(step, 1, 4), lr=0.05, step=step)
            found = contents(table)
            torch.testing.assert_close(found["state.exp_avg"], adam.state[dense]["exp_avg"], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(found["state.exp_avg_sq"], adam.state[dense]["exp_avg_sq"], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(found["rows"] - lazy_before, dense.detach() - dense_before, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(contents(table)["rows"], dense.detach())  # dense Adam moved without gradients, too


def test_partial_rowwise_adam_is_adam_with_one_second_moment_for_a_row() -> None:
    optimizer, table = make_table("partial_rowwise_adam", 3, 4, betas=(0.9, 0.99), weight_decay=0.1)
    w = contents(table)["rows"][1].double()
    m, v, last = torch.zeros(4, dtype=torch.float64), 0.0, 0
    for step in (1, 2, 7):
        g = gradient(step, 1, 4)
        optimizer.update(table, np.array([1]), g, lr=0.05, step=step)
        m = 0.9 ** (step - last) * m + 0.1 * g[0].double()
        v = 0.99 ** (step - last) * v + 0.01 * float(g.double().square().mean())
        last = step
        w = (1 - 0.05 * 0.1) * w - 0.05 * m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.99**step)) + 1e-8)
    found = contents(table)
    torch.testing.assert_close(found["rows"][1].double(), w, rtol=1e-5, atol=1e-6)
    assert found["state.exp_avg_sq"].tolist() == pytest.approx([0, v, 0], rel=1e-5)
    assert found["state.last_step"].tolist() == [0, 7, 0]


def test_rowwise_adagrad_follows_its_formula() -> None:
    optimizer, table = make_table("rowwise_adagrad", 3, 4, epsilon=1e-6, weight_decay=0.01)
    before = contents(table)["rows"]
    expected, accumulated = before[1].tolist(), 0.0
    for step in (1, 4, 5):
        g = gradient(step, 1, 4)
        optimizer.update(table, np.array([1]), g, lr=0.3, step=step)
        accumulated += sum(x * x for x in g[0].tolist()) / 4
        for i, x in enumerate(g[0].tolist()):
            expected[i] = expected[i] * (1 - 0.3 * 0.01) - 0.3 * x / (math.sqrt(accumulated) + 1e-6)
    found = contents(table)
    torch.testing.assert_close(found["rows"][1], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert found["state.accumulator"].tolist() == pytest.approx([0.0, accumulated, 0.0])
    assert torch.equal(found["rows"][[0, 2]], before[[0, 2]])


def test_sgd_follows_its_formula_and_keeps_no_state() -> None:
    optimizer, table = make_table("sgd", 2, 3, weight_decay=0.5)
    before = contents(table)
    optimizer.update(table, np.array([0]), torch.ones(1, 3), lr=0.1, step=1)
    assert contents(table).keys() == {"rows", "state.touched"}
    torch.testing.assert_close(contents(table)["rows"][0], before["rows"][0] * 0.95 - 0.1)


def balanced(matrix: Tensor, iterations: int) -> Tensor:
    """Steps 3 and 4 of the algorithm as the report writes them."""
    norms = matrix.norm(dim=1)
    u = torch.where((norms > 1e-3 * norms.mean())[:, None], matrix, 0)
    for k in range(1, iterations + 1):
        u = u / (u.norm(dim=k % 2, keepdim=True) + 1e-20)
    return u


@pytest.mark.parametrize("iterations", [1, 11])
def test_sinkhorn_momentum_follows_the_algorithm(iterations: int) -> None:
    optimizer, table = make_table("sinkhorn_momentum", 40, 6, momentum=0.9, sinkhorn_iterations=iterations)
    w, m = contents(table)["rows"].double(), torch.zeros(40, 6, dtype=torch.float64)
    for step in range(1, 6):
        g = gradient(step, 40, 6) * torch.logspace(-6, 1, 40)[:, None]  # the first rows are negligible
        optimizer.update(table, np.arange(40), g, lr=0.2, step=step)
        m = 0.9 * m + 0.1 * g.double()
        u = balanced(0.9 * m + 0.1 * g.double(), iterations)
        assert not u[0].any() and u[-1].any()
        w -= 0.18 * 0.2 * math.sqrt(6) * u
        found = contents(table)
        torch.testing.assert_close(found["rows"].double(), w, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["state.momentum_buffer"].double(), m, rtol=1e-5, atol=1e-9)


def test_sinkhorn_momentum_catches_up_and_leaves_the_rest_out() -> None:
    optimizer, table = make_table("sinkhorn_momentum", 9, 4, momentum=0.9, weight_decay=0.1)
    g = gradient(1, 9, 4)
    optimizer.update(table, np.arange(9), g, lr=0.1, step=1)
    before, some = contents(table), np.array([7, 2])
    optimizer.update(table, some, g[some], lr=0.1, step=5)
    m = 0.9**4 * 0.1 * g[some] + 0.1 * g[some]
    found = contents(table)
    torch.testing.assert_close(found["state.momentum_buffer"][some], m)
    move = -0.1 * 0.18 * 2 * balanced((0.9 * m + 0.1 * g[some]).double(), 11).float()
    torch.testing.assert_close(found["rows"][some], before["rows"][some] * (1 - 0.1 * 0.1) + move, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["matrix", "column", "no rows"])
def test_sinkhorn_of_zeros_is_zero(zero: str) -> None:
    matrix = gradient(0, 0 if zero == "no rows" else 12, 5)
    if zero == "matrix":
        matrix.zero_()
    elif zero == "column":
        matrix[:, 2] = 0
    rows, columns = sinkhorn_scales(matrix, iterations=11, group=None)
    result = rows[:, None] * matrix * columns
    assert result.isfinite().all()
    if zero == "column":
        torch.testing.assert_close(result, balanced(matrix.double(), 11))
    else:
        assert not result.any()


@pytest.mark.parametrize("iterations", [1, 11, 33, 99])
def test_sinkhorn_copes_with_a_column_of_zeros(iterations: int) -> None:
    """The output half of a new bank block has no gradient in the first step."""
    matrix = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    matrix[:, 2] = 0
    rows, columns = sinkhorn_scales(matrix, iterations=iterations, group=None)
    balanced = rows[:, None] * matrix * columns
    assert balanced.isfinite().all() and not balanced[:, 2].any()
    torch.testing.assert_close(balanced.norm(dim=1), torch.ones(20, dtype=torch.float64))


def test_sinkhorn_copes_with_columns_of_any_size() -> None:
    matrix = (gradient(0, 300, 7) * torch.logspace(-15, 4, 7)).double()
    rows, columns = sinkhorn_scales(matrix.float(), iterations=11, group=None)
    torch.testing.assert_close(rows[:, None] * matrix * columns, balanced(matrix, 11), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (70_000, 7), (999, 160)])
def test_sinkhorn_reductions_equal_their_references(
    shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_threads", threads)
    matrix = gradient(0, *shape) * 100
    rows, columns = torch.rand(shape[0], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64)
    torch.testing.assert_close(row_norms(matrix, columns), reference.row_norms(matrix, columns), rtol=1e-13, atol=0)
    peak = column_maxima(matrix, rows, columns)
    assert torch.equal(peak, reference.column_maxima(matrix, rows, columns))
    scaled = columns / peak.clamp(min=1e-300)
    found = column_squares(matrix, rows, scaled, bits=44)
    assert torch.equal(found, reference.column_squares(matrix, rows, scaled, 44))
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))
    assert torch.equal(column_squares(matrix[order], rows[order], scaled, bits=44), found)


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", sorted(ROW_OPTIMIZERS))
def test_placement_changes_no_bit(name: str, format: str) -> None:
    results = []
    for placement in ("contiguous", "scrambled"):
        optimizer, table = make_table(name, 50, 33, format=format, placement=placement)
        for step in range(1, 6):
            rows = np.random.default_rng(step).choice(50, 20, replace=False)
            local = table.placement.positions(rows)
            order = np.argsort(local)
            optimizer.update(table, local[order], gradient(step, 20, 33)[order], lr=0.1, step=step)
        where = torch.from_numpy(table.placement.positions(np.arange(50)))
        results.append({k: t.reshape(50, -1).view(torch.uint8)[where] for k, t in contents(table).items()})
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("name", sorted(ROW_OPTIMIZERS))
def test_untouched_rows_and_their_state_keep_their_bytes(name: str) -> None:
    optimizer, table = make_table(name, 9, 3, weight_decay=0.5)
    optimizer.update(table, np.array([0, 1, 2, 3, 7, 8]), gradient(1, 6, 3), lr=0.1, step=1)
    before = contents(table)
    optimizer.update(table, np.array([7, 2]), gradient(2, 2, 3), lr=0.1, step=2)
    optimizer.update(table, np.empty(0, dtype=np.int64), torch.empty(0, 3), lr=0.1, step=3)
    rest = torch.tensor([0, 1, 3, 4, 5, 6, 8])
    for key, tensor in contents(table).items():
        assert torch.equal(tensor[rest], before[key][rest])
        assert key == "state.touched" or not torch.equal(tensor[[2, 7]], before[key][[2, 7]])
    assert contents(table)["state.touched"].tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1] and table.usage == 6 / 9


def test_lazy_adam_refuses_to_repeat_a_step() -> None:
    optimizer, table = make_table("lazy_adam", 4, 2)
    optimizer.update(table, np.array([1]), torch.ones(1, 2), lr=0.1, step=5)
    with pytest.raises(ValueError, match=r"step 5 is not later than the last update of a row \(step 5\)"):
        optimizer.update(table, np.array([0, 1]), torch.ones(2, 2), lr=0.1, step=5)
