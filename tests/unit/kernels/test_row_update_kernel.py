from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megamem_kernels import row_update
from megamem_kernels.formats import FormatName, row_fields
from megamem_kernels.parallel import set_threads
from megamem_kernels.rounding.reference import quantize_rows
from megamem_kernels.row_update import TouchedRows, TouchedState, reference
from megamem_kernels.row_update import op as row_update_op

SLOTS, KEY = 23, 2**64 - 59
FORMATS: tuple[FormatName, ...] = ("fp32", "bf16", "fp8")
WIDTHS = (1, 7, 33, 160)
ADAM = {"lr": 0.05, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(row_update_op, "_GRAIN", 1)
    yield
    set_threads(0)


@dataclass
class Table:
    """Rows, and the state of one rule."""

    fields: dict[str, Tensor]
    state: dict[str, Tensor]

    def rows(self, slots: Tensor) -> TouchedRows:
        return TouchedRows(self.fields, slots, slots + 2**31, KEY)

    def clone(self) -> Table:
        return Table(
            {name: field.clone() for name, field in self.fields.items()},
            {name: array.clone() for name, array in self.state.items()},
        )

    def values(self) -> Tensor:
        """Decoded rows ``[SLOTS, width]``."""
        return reference._values(TouchedRows(self.fields, torch.arange(SLOTS), torch.arange(SLOTS), KEY))

    def tensors(self) -> list[Tensor]:
        return [tensor.view(torch.uint8) for tensor in (*self.fields.values(), *self.state.values())]


RULES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "sgd_": ({"lr": 0.05, "weight_decay": 0.1}, {}),
    "rowwise_adagrad_": ({"lr": 0.05, "epsilon": 1e-8, "weight_decay": 0.1}, {"accumulator": "row"}),
    "lazy_adam_": (ADAM, {"exp_avg": "element", "exp_avg_sq": "element", "last_step": "step"}),
    "partial_rowwise_adam_": (ADAM, {"exp_avg": "element", "exp_avg_sq": "row", "last_step": "step"}),
}


def make_table(rule: str, width: int, fmt: FormatName = "fp32") -> Table:
    generator = torch.Generator().manual_seed(width)
    fields = {field.name: field.allocate(SLOTS) for field in row_fields(fmt, width)}
    quantize_rows(torch.randn(SLOTS, width, generator=generator), fields)
    shapes = {"element": (SLOTS, width), "row": (SLOTS,), "step": (SLOTS,)}
    state = {
        name: torch.zeros(shapes[kind], dtype=torch.int32 if kind == "step" else torch.float32)
        for name, kind in RULES[rule][1].items()
    }
    return Table(fields, state)


def gradient(step: int, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 3 - 2)


STEPS = ((1, [3, 22, 0]), (2, [3]), (3, []), (7, [5, 3, 22, 1]), (2000, [1, 0, 9]), (2001, [1, 9, 4, 21, 0, 2, 3]))


def run(rule: str, table: Table, function: Callable[..., None], steps: Any = STEPS) -> None:
    for step, slots in steps:
        index = torch.tensor(slots, dtype=torch.int64)
        g = gradient(step, len(slots), table.fields["rows"].shape[1])
        state = [TouchedState(table.state, index)] if table.state else []
        function(table.rows(index), *state, g, step=step, **RULES[rule][0])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_fp32_rows_follow_the_definition(rule: str, width: int) -> None:
    table = make_table(rule, width)
    expected = table.clone()
    run(rule, table, getattr(row_update, rule))
    run(rule, expected, getattr(reference, rule))
    torch.testing.assert_close(table.fields, expected.fields, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table.state, expected.state, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_stored_rows_are_the_fp32_update_rounded(rule: str, width: int, fmt: FormatName) -> None:
    table = make_table(rule, width, fmt)
    exact = Table({"rows": table.values()}, table.clone().state)
    for step in STEPS:
        run(rule, table, getattr(row_update, rule), [step])
        run(rule, exact, getattr(row_update, rule), [step])
        slots = torch.tensor(step[1], dtype=torch.int64)
        rounded = {field.name: field.allocate(len(slots)) for field in row_fields(fmt, width)}
        quantize_rows(exact.fields["rows"][slots], rounded, key=KEY, step=step[0], ids=slots + 2**31)
        for name, field in rounded.items():
            assert table.fields[name][slots].view(torch.uint8).equal(field.view(torch.uint8))
        exact.fields["rows"].copy_(table.values())
    assert all(table.state[name].equal(exact.state[name]) for name in table.state)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_threads_change_no_bit(rule: str, fmt: FormatName) -> None:
    results = []
    for threads in (1, 3):
        set_threads(threads)
        table = make_table(rule, 33, fmt)
        run(rule, table, getattr(row_update, rule))
        results.append(table.tensors())
    assert all(one.equal(three) for one, three in zip(*results, strict=True))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_untouched_rows_and_their_state_keep_their_bytes(rule: str, fmt: FormatName) -> None:
    table = make_table(rule, 33, fmt)
    run(rule, table, getattr(row_update, rule), [(1, list(range(SLOTS)))])
    before = table.clone()
    run(rule, table, getattr(row_update, rule), [(2, [7, 2]), (3, [])])
    rest = torch.tensor([slot for slot in range(SLOTS) if slot not in (7, 2)])
    for old, new in zip(before.tensors(), table.tensors(), strict=True):
        old, new = old.view(SLOTS, -1), new.view(SLOTS, -1)
        assert old[rest].equal(new[rest])
    changed = (before.values() != table.values()).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lazy_adam_is_dense_adam_where_every_row_is_touched(weight_decay: float) -> None:
    table, settings = make_table("lazy_adam_", 7), ADAM | {"weight_decay": weight_decay}
    dense = torch.nn.Parameter(table.values())
    adamw = torch.optim.AdamW([dense], lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    for step in range(1, 41):
        dense.grad = gradient(step, SLOTS, 7)
        adamw.step()
        order = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(step))
        touched = TouchedState(table.state, order)
        row_update.lazy_adam_(table.rows(order), touched, gradient(step, SLOTS, 7)[order], step=step, **settings)
    torch.testing.assert_close(table.values(), dense.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table.state["exp_avg_sq"], adamw.state[dense]["exp_avg_sq"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("last", [40, 3000])
def test_lazy_adam_with_gaps_has_the_moments_and_the_move_of_dense_adam(last: int) -> None:
    table, settings = make_table("lazy_adam_", 4), ADAM | {"weight_decay": 0.0, "beta2": 0.9995, "beta1": 0.999}
    slot = torch.tensor([5])
    dense = torch.nn.Parameter(table.values()[slot].double())
    adam = torch.optim.Adam([dense], lr=0.05, betas=(0.999, 0.9995), eps=1e-8)
    for step in range(1, last + 1):
        touched = step in (3, 4, 11, last)
        dense_before, lazy_before = dense.detach().clone(), table.values()[slot]
        dense.grad = (gradient(step, 1, 4) if touched else torch.zeros(1, 4)).double()
        adam.step()
        if touched:
            row_update.lazy_adam_(
                table.rows(slot), TouchedState(table.state, slot), gradient(step, 1, 4), step=step, **settings
            )
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    table.state[name][slot].double(), adam.state[dense][name], rtol=1e-6, atol=1e-12
                )
            move = table.values()[slot] - lazy_before
            torch.testing.assert_close(move.double(), dense.detach() - dense_before, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(table.values()[slot].double(), dense.detach())  # dense Adam also moved without a gradient


def test_partial_rowwise_adam_has_one_second_moment_per_row() -> None:
    table = make_table("partial_rowwise_adam_", 6)
    slot, m, v, w = torch.tensor([4]), np.zeros(6), 0.0, table.values()[4].double().numpy()
    for step, gap in ((2, 2), (3, 1), (9, 6)):
        g = gradient(step, 1, 6)
        state = TouchedState(table.state, slot)
        row_update.partial_rowwise_adam_(table.rows(slot), state, g, step=step, **ADAM)
        g64 = g[0].double().numpy()
        m, v = 0.9**gap * m + 0.1 * g64, 0.99**gap * v + 0.01 * (g64**2).mean()
        denominator = np.sqrt(v / (1 - 0.99**step)) + 1e-8
        w = (1 - 0.05 * 0.1) * w - 0.05 * m / (1 - 0.9**step) / denominator
    assert table.values()[4].numpy() == pytest.approx(w, rel=1e-5)
    assert table.state["exp_avg_sq"][4].item() == pytest.approx(v, rel=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_momentum_follows_the_definition_and_add_scaled_moves_rows(width: int) -> None:
    states = [{"momentum_buffer": torch.zeros(SLOTS, width), "last_step": torch.zeros(SLOTS, dtype=torch.int32)}]
    states.append({name: array.clone() for name, array in states[0].items()})
    table = make_table("sgd_", width)
    for step, slots in STEPS:
        index, g = torch.tensor(slots, dtype=torch.int64), gradient(step, len(slots), width)
        result = row_update.momentum_(TouchedState(states[0], index), g, beta=0.95, step=step)
        expected = reference.momentum_(TouchedState(states[1], index), g, beta=0.95, step=step)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)
        before = table.values()
        row_update.add_scaled_(table.rows(index), result, alpha=-0.2, weight_decay=0.5, lr=0.1, step=step)
        torch.testing.assert_close(table.values()[index], before[index] * 0.95 - 0.2 * result, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-9)


def test_rows_and_state_have_slots_of_their_own() -> None:
    table = make_table("lazy_adam_", 33)
    expected, order = table.clone(), torch.randperm(SLOTS, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([3, 20, 8])
    row_update.lazy_adam_(
        TouchedRows({"rows": table.fields["rows"][order].contiguous()}, order.argsort()[index], index, KEY),
        TouchedState(table.state, index),
        gradient(1, 3, 33),
        step=1,
        **ADAM,
    )
    run_state = TouchedState(expected.state, index)
    row_update.lazy_adam_(expected.rows(index), run_state, gradient(1, 3, 33), step=1, **ADAM)
    torch.testing.assert_close(table.state, expected.state, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["lazy_adam_", "partial_rowwise_adam_"])
def test_a_step_is_not_repeated(rule: str) -> None:
    table = make_table(rule, 3)
    run(rule, table, getattr(row_update, rule), [(5, [1])])
    before = table.clone()
    with pytest.raises(ValueError, match=r"step 5 is not later than the last update of a row \(step 5\)"):
        run(rule, table, getattr(row_update, rule), [(5, [1])])
    assert all(old.equal(new) for old, new in zip(before.tensors(), table.tensors(), strict=True))
    buffer = {"momentum_buffer": torch.zeros(2, 3), "last_step": torch.tensor([4, 9], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"step 5 is not later than the last update of a row \(step 9\)"):
        row_update.momentum_(TouchedState(buffer, torch.tensor([0, 1])), torch.ones(2, 3), beta=0.9, step=5)


def test_tensors_that_do_not_fit_are_refused() -> None:
    table, index, g = make_table("lazy_adam_", 3), torch.tensor([1, 2]), torch.ones(2, 3)
    state = TouchedState(table.state, index)
    wrong: list[tuple[str, TouchedRows, TouchedState, Tensor]] = [
        ("gradient", table.rows(index), state, g.double()),
        ("rows", table.rows(index), state, torch.ones(2, 4)),
        ("slots of rows", table.rows(index[:1]), state, g),
        ("ids", TouchedRows(table.fields, index, index.int(), KEY), state, g),
        ("slots of state", table.rows(index), TouchedState(table.state, index[:1]), g),
        ("exp_avg_sq", table.rows(index), TouchedState(table.state | {"exp_avg_sq": torch.zeros(SLOTS)}, index), g),
        ("last_step", table.rows(index), TouchedState(table.state | {"last_step": torch.zeros(SLOTS)}, index), g),
    ]
    for name, rows, touched, values in wrong:
        with pytest.raises(ValueError, match=name):
            row_update.lazy_adam_(rows, touched, values, step=1, **ADAM)


@pytest.mark.parametrize("rule", ["lazy_adam_", "partial_rowwise_adam_"])
def test_an_owner_without_rows_updates_nothing(rule: str) -> None:
    table, none = make_table(rule, 3), torch.empty(0, dtype=torch.int64)
    empty = Table(
        {name: field[:0] for name, field in table.fields.items()},
        {name: array[:0] for name, array in table.state.items()},
    )
    state = TouchedState(empty.state, none)
    getattr(row_update, rule)(empty.rows(none), state, torch.empty(0, 3), step=1, **ADAM)
    assert all(len(tensor) == 0 for tensor in empty.tensors())


def test_offsets_of_a_row_pass_two_to_the_31() -> None:
    width = 2**21 + 1
    rows = torch.empty(1026, width, dtype=torch.bfloat16)  # touched pages alone take memory
    assert (len(rows) - 1) * width > 2**31
    slots = torch.tensor([1025, 0])
    rows[slots] = 1.0
    touched = TouchedRows({"rows": rows}, slots, slots, KEY)
    row_update.sgd_(touched, torch.ones(2, width), lr=0.5, weight_decay=0.0, step=1)
    assert rows[1025].eq(0.5).all() and rows[0].eq(0.5).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("width", [1, 33, 1060])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_triton_follows_the_definition(monkeypatch: pytest.MonkeyPatch, rule: str, width: int, fmt: FormatName) -> None:
    triton_table = make_table(rule, width, fmt)
    table = triton_table.clone()
    for step in STEPS:
        run(rule, table, getattr(row_update, rule), [step])
        with np.errstate(over="ignore"):
            run(rule, triton_table, triton_form(rule), [step])
        torch.testing.assert_close(triton_table.state, table.state, rtol=1e-5, atol=1e-12)
        if fmt == "fp32":
            torch.testing.assert_close(triton_table.fields, table.fields, rtol=1e-5, atol=1e-6)
        else:  # a last bit of the fp32 value may move a rounding to the neighbour
            same = triton_table.values() == table.values()
            assert same.float().mean() > 0.995
            torch.testing.assert_close(triton_table.values(), table.values(), rtol=0.13, atol=0.01)
        for name, tensor in (triton_table.fields | triton_table.state).items():
            (table.fields | table.state)[name].copy_(tensor)


def triton_form(rule: str) -> Callable[..., None]:
    """The Triton form of an op on CPU tensors, which the interpreter runs."""
    from megamem_kernels.row_update import triton

    def add(rows: TouchedRows, g: Tensor, *, lr: float, weight_decay: float, step: int) -> None:
        triton.add_scaled(rows, g, -lr, 1 - lr * weight_decay, step)

    def adagrad(
        rows: TouchedRows, state: TouchedState, g: Tensor, *, lr: float, epsilon: float, weight_decay: float, step: int
    ) -> None:
        triton.rowwise_adagrad(rows, state, g, lr, epsilon, 1 - lr * weight_decay, step)

    def adam(rows: TouchedRows, state: TouchedState, g: Tensor, *, step: int, **s: float) -> None:
        triton.adam(
            rows, state, g, s["lr"] / (1 - s["beta1"] ** step), s["beta1"], s["beta2"],
            (1 - s["beta2"] ** step) ** -0.5, s["epsilon"], 1 - s["lr"] * s["weight_decay"], step,
        )  # fmt: skip

    return {"sgd_": add, "rowwise_adagrad_": adagrad}.get(rule, adam)


@pytest.mark.parametrize("width", [1, 33, 1060])
def test_triton_momentum_follows_the_definition(width: int) -> None:
    from megamem_kernels.row_update import triton

    states = [{"momentum_buffer": torch.zeros(SLOTS, width), "last_step": torch.zeros(SLOTS, dtype=torch.int32)}]
    states.append({name: array.clone() for name, array in states[0].items()})
    for step, slots in STEPS:
        index, g = torch.tensor(slots, dtype=torch.int64), gradient(step, len(slots), width)
        out = torch.full_like(g, torch.nan)
        triton.momentum(TouchedState(states[0], index), g, 0.95, step, out)
        expected = reference.momentum_(TouchedState(states[1], index), g, beta=0.95, step=step)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-9)
