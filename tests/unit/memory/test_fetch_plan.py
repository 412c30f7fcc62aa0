from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamem.batch import MicroBatch, StepBatch
from megamem.errors import ConfigError
from megamem.memory.placement import Placement, PlacementName
from megamem.memory.plan import plan_step, plan_stream
from megamem.memory.spec import InitSegment, TableSpec
from megamem.parallel.layout import owner_range


class ShiftStream:
    """Token + (0 .. k-1), so that expected addresses are plain; evaluation reads row 0."""

    def __init__(self, rows: int = 100, k: int = 2) -> None:
        self.name, self.rows, self.k = "shift", rows, k
        self.tables = (TableSpec("t", rows, 1, (InitSegment(1, 1.0),)),)

    def addresses(self, micro: MicroBatch, positions: slice, *, train: bool = True) -> np.ndarray:
        ids = micro.tokens[:, positions, None] + np.arange(self.k)
        return ids if train else np.zeros_like(ids)


PLACEMENTS = {"shift": Placement("contiguous", 100)}


def micro_batch(tokens: np.ndarray) -> MicroBatch:
    b, s = tokens.shape
    return MicroBatch(
        sample_ids=np.arange(b),
        tokens=tokens,
        labels=tokens,
        loss_mask=np.ones((b, s), dtype=np.float32),
        document_ids=np.zeros((b, s), dtype=np.int32),
        document_paths=np.zeros((1, 0), dtype=np.int64),
    )


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    rows=st.integers(1, 2**40),
    owners=st.integers(1, 9),
    name=st.sampled_from(["contiguous", "scrambled"]),
)
def test_plan_restores_every_address(data: st.DataObject, rows: int, owners: int, name: PlacementName) -> None:
    placement = Placement(name, rows)
    lengths = data.draw(st.lists(st.integers(0, 12), max_size=4))
    addresses = [
        np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=n, max_size=n)), dtype=np.int64).reshape(1, n, 1)
        for n in lengths
    ]
    plan = plan_stream("s", placement, addresses, owners)
    assert len(plan.inverse) == len(addresses)
    for inverse, array in zip(plan.inverse, addresses, strict=True):
        assert inverse.shape == array.shape and inverse.dtype == np.int64
        np.testing.assert_array_equal(placement.logical(plan.ids[inverse]), array)
    assert (np.diff(plan.ids) > 0).all() and plan.lookups == sum(lengths)
    assert set(placement.logical(plan.ids).tolist()) == {int(i) for array in addresses for i in array.flat}
    assert len(plan.counts) == owners and all(type(count) is int for count in plan.counts)
    for owner, ids in enumerate(np.split(plan.ids, np.cumsum(plan.counts))[:-1]):
        owned = owner_range(rows, owners, owner)
        assert all(int(i) in owned for i in ids)
    assert sum(plan.counts) == len(plan.ids)


@pytest.mark.parametrize(
    ("rows", "ids", "unique", "counts"),
    [
        (10, [], [], (0, 0, 0)),
        (10, [4, 4, 4], [4], (0, 1, 0)),
        (1, [0, 0], [0], (1, 0, 0)),
        (10, [9, 0, 9], [0, 9], (1, 0, 1)),
        (2**33, [2**33 - 1, 2**31 + 5, 2**31 + 5], [2**31 + 5, 2**33 - 1], (1, 0, 1)),
    ],
)
def test_awkward_ids(rows: int, ids: list[int], unique: list[int], counts: tuple[int, ...]) -> None:
    plan = plan_stream("s", Placement("contiguous", rows), [np.array(ids, dtype=np.int64)], 3)
    assert plan.ids.tolist() == unique and plan.counts == counts


@pytest.mark.parametrize("name", ["contiguous", "scrambled"])
@pytest.mark.parametrize("bad", [-1, 10])
def test_addresses_outside_the_table_are_refused(bad: int, name: PlacementName) -> None:
    with pytest.raises(ValueError, match=f"stream s gave address {bad}, outside its 10 rows"):
        plan_stream("s", Placement(name, 10), [np.array([3, bad])], 2)


def test_each_tensor_parallel_rank_plans_its_slice() -> None:
    tokens = np.arange(12).reshape(2, 6) * 3
    batch = StepBatch(step=4, micro_batches=(micro_batch(tokens), micro_batch(tokens[:1])))
    for index, positions in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
        plan = plan_step(batch, [ShiftStream()], PLACEMENTS, owners=6, slice_index=index, slices=3).streams["shift"]
        np.testing.assert_array_equal(plan.ids[plan.inverse[0]], tokens[:, positions, None] + np.arange(2))
        assert plan.inverse[1].shape == (1, 2, 2)
    with pytest.raises(ConfigError, match=r"data\.seq_length=6"):
        plan_step(batch, [ShiftStream()], PLACEMENTS, owners=4, slice_index=0, slices=4)


def test_streams_learn_whether_the_step_trains() -> None:
    batch = StepBatch(step=0, micro_batches=(micro_batch(np.full((1, 3), 7)),))
    assert plan_step(batch, [ShiftStream()], PLACEMENTS, owners=1).streams["shift"].ids.tolist() == [7, 8]
    assert plan_step(batch, [ShiftStream()], PLACEMENTS, owners=1, train=False).streams["shift"].ids.tolist() == [0]


def test_step_without_micro_batches() -> None:
    plan = plan_step(StepBatch(step=1, micro_batches=()), [ShiftStream()], PLACEMENTS, owners=2)
    assert plan.streams["shift"].counts == (0, 0) and plan.streams["shift"].inverse == ()
