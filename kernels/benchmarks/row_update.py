"""Training steps of a table read in weighted bags, and updates of touched rows alone, beside their peers.

A step finds the distinct rows, fetches them, and does forward, backward (rows and weights) and update. All contenders of a step
work on the same table in huge pages, and on the same optimizer state where theirs has the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from harness import Case, Contender, NotInstalled, Options
from row_gather import huge, row_ids

from megamem_kernels import row_update
from megamem_kernels.bag_sum import weighted_bag
from megamem_kernels.formats import FormatName, row_fields
from megamem_kernels.row_gather import copy_rows
from megamem_kernels.row_update import TouchedRows, TouchedState, reference
from megamem_kernels.unique import unique

SPARSE_ADAM = "EmbeddingBag(sparse) + SparseAdam"
FBGEMM = "FBGEMM, fused row-wise Adagrad"
REFERENCE = "the definition in torch"
WIDTH, BAG = 128, 32
ADAGRAD = {"lr": 1e-3, "epsilon": 1e-8, "weight_decay": 0.0}
ADAM = ADAGRAD | {"beta1": 0.9, "beta2": 0.99}


class Bags:
    """One table with its state, and the lookups and upstream gradient of a step."""

    def __init__(self, rows: int, lookups: int, generator: np.random.Generator) -> None:
        self.ids = row_ids("Zipf(1.05)", rows, lookups // BAG * BAG, generator)
        self.bags = len(self.ids) // BAG
        self.table = huge(torch.float32, rows, WIDTH).fill_(0.01)
        self.moments = [huge(torch.float32, rows, WIDTH).zero_() for _ in range(2)]
        self.state = {
            "accumulator": torch.zeros(rows),
            "exp_avg": self.moments[0],
            "exp_avg_sq": self.moments[1],
            "last_step": torch.zeros(rows, dtype=torch.int32),
        }
        self.upstream = torch.from_numpy(generator.standard_normal((self.bags, WIDTH), dtype=np.float32))
        self.weights = torch.rand(self.bags, BAG).requires_grad_()
        self.working_set, self.gradient = (huge(torch.float32, len(self.ids), WIDTH) for _ in range(2))
        self.steps = count(1)

    def ours(self, update: Callable[..., None], settings: dict[str, Any]) -> None:
        """Working set, :func:`weighted_bag`, update of the touched rows."""
        distinct, inverse = map(torch.from_numpy, unique(self.ids.numpy(), len(self.table)))
        rows = copy_rows(self.table, distinct, self.working_set[: len(distinct)]).requires_grad_()
        self.weights.grad = None
        gradient = self.gradient[: len(distinct)]
        weighted_bag(rows, inverse.view(self.bags, BAG), self.weights, gradient=gradient).backward(self.upstream)
        touched = TouchedRows({"rows": self.table}, distinct, distinct, key=0)
        update(touched, TouchedState(self.state, distinct), rows.grad, step=next(self.steps), **settings)

    def torch_alone(self, update: Callable[..., None], settings: dict[str, Any]) -> None:
        """The same with torch's own operations."""
        distinct, inverse = torch.unique(self.ids, return_inverse=True)
        rows = self.working_set[: len(distinct)]
        torch.index_select(self.table, 0, distinct, out=rows)
        rows.requires_grad_()
        self.weights.grad = None
        bag = torch.nn.functional.embedding_bag
        result = bag(inverse.view(self.bags, BAG), rows, mode="sum", per_sample_weights=self.weights)
        result.backward(self.upstream)
        touched = TouchedRows({"rows": self.table}, distinct, distinct, key=0)
        update(touched, TouchedState(self.state, distinct), rows.grad, step=next(self.steps), **settings)

    def sparse_adam(self) -> Callable[[], None]:
        """``nn.EmbeddingBag`` with sparse gradients."""
        bag = torch.nn.EmbeddingBag(1, 1, mode="sum", sparse=True)
        bag.weight = torch.nn.Parameter(self.table)
        optimizer = torch.optim.SparseAdam([bag.weight], lr=1e-3, betas=(0.9, 0.99))
        optimizer.state[bag.weight] = {"step": 0, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}
        index = self.ids.view(self.bags, BAG)

        def step() -> None:
            optimizer.zero_grad()
            self.weights.grad = None
            bag(index, per_sample_weights=self.weights).backward(self.upstream)
            optimizer.step()

        return step

    def fbgemm(self) -> Callable[[], None]:
        """FBGEMM's table-batched embedding, whose backward pass updates the table; built by its first run."""
        steps: list[Callable[[], None]] = []

        def step() -> None:
            if not steps:
                steps.append(self._build_fbgemm())
            steps[0]()

        return step

    def _build_fbgemm(self) -> Callable[[], None]:
        try:
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                SplitTableBatchedEmbeddingBagsCodegen,
            )
        except (ImportError, OSError) as error:
            raise NotInstalled("not installed (extra `bench`)") from error
        layer = SplitTableBatchedEmbeddingBagsCodegen(
            [(len(self.table), WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=1e-3,
            eps=1e-8,
        )
        layer.weights_host.data = self.table.view(-1)
        offsets = torch.arange(0, len(self.ids) + 1, BAG)

        def step() -> None:
            self.weights.grad = None
            layer(self.ids, offsets, per_sample_weights=self.weights.view(-1)).backward(self.upstream)

        return step


def step_cases(bags: Bags) -> list[Case]:
    """Whole steps."""
    shape = (
        f"{len(bags.table) / 1e6:g}M x {WIDTH} fp32, {len(bags.ids):,} Zipf(1.05) ids "
        f"({len(torch.unique(bags.ids)):,} distinct), bags of {BAG}, weighted"
    )
    adagrad, adam = "rowwise_adagrad_", "lazy_adam_"
    peer = Contender(SPARSE_ADAM, bags.sparse_adam(), "same table and moments")
    return [
        Case(
            f"forward + backward + row-wise Adagrad, {shape}",
            [
                Contender("working set + weighted_bag", partial(bags.ours, getattr(row_update, adagrad), ADAGRAD)),
                peer,
                Contender(FBGEMM, bags.fbgemm(), "same table"),
                Contender("torch alone", partial(bags.torch_alone, getattr(reference, adagrad), ADAGRAD)),
            ],
            bars={SPARSE_ADAM: 8.0, FBGEMM: 3.0},
        ),
        Case(
            f"forward + backward + lazy Adam, {shape}",
            [
                Contender("working set + weighted_bag", partial(bags.ours, getattr(row_update, adam), ADAM)),
                peer,
                Contender("torch alone", partial(bags.torch_alone, getattr(reference, adam), ADAM)),
            ],
            bars={SPARSE_ADAM: 6.0},
        ),
    ]


def update_cases(bags: Bags, rows: int) -> Iterator[Case]:
    """Updates alone, of rows of the first ``rows`` of the table: each rule beside plain torch, then each row format."""
    ids = torch.unique(bags.ids % rows)
    gradient = torch.randn(len(ids), WIDTH)
    state = TouchedState({name: array[:rows] for name, array in bags.state.items()}, ids)
    row_moments = state.arrays | {"exp_avg_sq": bags.state["accumulator"][:rows]}
    buffers = state.arrays | {"momentum_buffer": state.arrays["exp_avg"]}

    def momentum_and_move(module: Any, touched: TouchedRows, _: TouchedState, **settings: Any) -> None:
        step = settings.pop("step")
        delta = module.momentum_(TouchedState(buffers, ids), gradient, beta=0.95, step=step)
        module.add_scaled_(touched, delta, alpha=-1e-3, lr=1e-3, weight_decay=0.0, step=step)

    def rule(name: str, own: TouchedState | None, settings: dict[str, Any]) -> Callable[..., None]:
        def run(module: Any, touched: TouchedRows) -> None:
            arguments = [touched] if own is None else [touched, own]
            getattr(module, name)(*arguments, gradient, step=next(bags.steps), **settings)

        return run

    def momentum(module: Any, touched: TouchedRows) -> None:
        momentum_and_move(module, touched, state, step=next(bags.steps))

    rules = {
        "SGD": rule("sgd_", None, {"lr": 1e-3, "weight_decay": 0.0}),
        "row-wise Adagrad": rule("rowwise_adagrad_", state, ADAGRAD),
        "lazy Adam": rule("lazy_adam_", state, ADAM),
        "partial row-wise Adam": rule("partial_rowwise_adam_", TouchedState(row_moments, ids), ADAM),
        "momentum and move of Sinkhorn": momentum,
    }
    plain = TouchedRows({"rows": bags.table[:rows]}, ids, ids, key=0)
    for name, update in rules.items():
        yield Case(
            f"update of {len(ids):,} rows of {WIDTH} fp32, {name}",
            [
                Contender("fused", partial(update, row_update, plain)),
                Contender(REFERENCE, partial(update, reference, plain), "not tuned"),
            ],
            bars={REFERENCE: 1.0},
        )
    formats: tuple[FormatName, ...] = ("bf16", "fp8")
    stored = {
        fmt: {field.name: huge(field.dtype, rows, *field.shape).zero_() for field in row_fields(fmt, WIDTH)}
        for fmt in formats
    }
    for name in ("row-wise Adagrad", "lazy Adam"):
        contenders = [
            Contender(
                f"{fmt}, rounded stochastically", partial(rules[name], row_update, TouchedRows(fields, ids, ids, 0))
            )
            for fmt, fields in stored.items()
        ]
        yield Case(
            f"update of {len(ids):,} rows of {WIDTH} by format, {name}",
            [*contenders, Contender("fp32", partial(rules[name], row_update, plain))],
        )


def cases(options: Options) -> list[Case]:
    """5M rows and 200,000 lookups; updates alone are of 1M rows."""
    rows, lookups, few = (3000, 640, 1000) if options.quick else (5_000_000, 200_000, 1_000_000)
    bags = Bags(rows, lookups, np.random.default_rng(options.seed))
    return [*step_cases(bags), *update_cases(bags, few)]
