from __future__ import annotations

import numpy as np
import pytest
import torch

from megamem.memory import table as table_module
from megamem.memory.table import InitSegment, OwnedTable, TableSpec, initial_rows

NORMAL = (InitSegment(6, 0.5),)


def test_rows_do_not_depend_on_the_number_of_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "_CHUNK_ELEMENTS", 20)  # 3 rows per chunk: owner ranges cut through chunks
    spec = TableSpec("t", 23, 6, (InitSegment(4, 0.5), InitSegment(2, 0.1, truncated=True)))
    whole = OwnedTable.create(spec, seed=3).rows
    for owners in (2, 3, 5, 23, 30):
        parts = [OwnedTable.create(spec, owners=owners, owner=i, seed=3) for i in range(owners)]
        assert torch.equal(torch.cat([part.rows for part in parts]), whole)
        assert [(part.start, part.stop) for part in parts] == [
            (min(i * -(-23 // owners), 23), min((i + 1) * -(-23 // owners), 23)) for i in range(owners)
        ]


def test_rows_depend_on_seed_and_name() -> None:
    base = initial_rows(TableSpec("a", 50, 6, NORMAL), 0, 50, seed=0)
    assert torch.equal(base, initial_rows(TableSpec("a", 50, 6, NORMAL), 0, 50, seed=0))
    assert not torch.equal(base, initial_rows(TableSpec("a", 50, 6, NORMAL), 0, 50, seed=1))
    assert not torch.equal(base, initial_rows(TableSpec("b", 50, 6, NORMAL), 0, 50, seed=0))


def test_segments_have_their_own_distribution() -> None:
    init = (InitSegment(8, 0.5), InitSegment(8, 0.02, truncated=True), InitSegment(4, 0.0))
    rows = initial_rows(TableSpec("t", 20_000, 20, init), 0, 20_000, seed=0).numpy()
    assert rows.dtype == np.float32
    assert rows[:, :8].std() == pytest.approx(0.5, rel=0.01) and abs(rows[:, :8].mean()) < 0.005
    assert np.abs(rows[:, :8]).max() > 1.5
    # A normal truncated at two standard deviations has 0.8796 of its standard deviation.
    assert rows[:, 8:16].std() == pytest.approx(0.8796 * 0.02, rel=0.01)
    assert 0.0399 < np.abs(rows[:, 8:16]).max() <= 0.04 * (1 + 1e-6)
    assert not rows[:, 16:].any()
    assert len(np.unique(rows[:, 0])) > 19_000  # chunks differ from each other


def test_init_must_cover_the_width() -> None:
    with pytest.raises(ValueError, match="table t"):
        TableSpec("t", 4, 7, NORMAL)


def test_usage_of_an_owner_without_rows_is_zero() -> None:
    table = OwnedTable.create(TableSpec("t", 2, 6, NORMAL), owners=3, owner=2, seed=0)
    table.state["touched"] = torch.zeros(0, dtype=torch.uint8)
    assert table.rows.shape == (0, 6) and table.usage == 0
