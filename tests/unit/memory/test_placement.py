from __future__ import annotations

import numpy as np
import pytest

from megamem.memory.placement import Placement, PlacementName
from megamem.parallel.layout import owner_range

SIZES = [1, 2, 3, 4, 5, 6, 7, 30, 97, 210, 1000, 4096, 65_537]


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", ["contiguous", "scrambled"])
def test_placement_is_a_bijection_with_its_inverse(name: PlacementName, rows: int) -> None:
    placement, ids = Placement(name, rows), np.arange(rows)
    positions = placement.positions(ids)
    assert positions.dtype == np.int64 and (np.sort(positions) == ids).all()
    assert (placement.logical(positions) == ids).all() and (placement.positions(placement.logical(ids)) == ids).all()
    assert (positions == ids).all() == (name == "contiguous" or rows <= 3)
    assert placement == Placement(name, rows, placement.multiplier)


@pytest.mark.parametrize("rows", [2**31 - 1, 2**31, 2**31 + 11, 2**40 + 15, 2**41])
def test_large_tables_need_no_more_than_int64(rows: int) -> None:
    placement = Placement("scrambled", rows)
    ids = np.unique(np.random.default_rng(0).integers(0, rows, 1000))
    ids[0], ids[-1] = 0, rows - 1
    positions = placement.positions(ids)
    assert positions.tolist() == [row * placement.multiplier % rows for row in ids.tolist()]
    assert (placement.logical(positions) == ids).all()


@pytest.mark.parametrize("owners", [2, 3, 4, 16])
def test_any_run_of_neighbours_is_spread_over_all_owners(owners: int) -> None:
    """The three-distance theorem: no owner gets more than its share of a run by more than a few rows."""
    rows = 100_003
    placement = Placement("scrambled", rows)
    starts = [owner_range(rows, owners, owner).start for owner in range(owners)]
    for first, count in ((0, 500), (31_000, 5000), (99_000, 1003)):
        owner = np.searchsorted(starts, placement.positions(np.arange(first, first + count)), side="right") - 1
        load = np.bincount(owner, minlength=owners)
        assert load.max() - count / owners < 8 and count / owners - load.min() < 8


def test_what_is_no_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        Placement("contiguous", 2**41 + 1)
    with pytest.raises(ValueError, match="multiplying by 10 is no bijection of 35 rows"):
        Placement("scrambled", 35, 10)
