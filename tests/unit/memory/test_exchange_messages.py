from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from megamem.memory.exchange.hop import CPU, Workspace, build_hops
from megamem.memory.exchange.ids import admit, checksum, mark_common
from megamem.memory.exchange.message import Form, Section, id_field
from megamem.memory.exchange.nodes import Link, NodeLayout, equal_nodes
from megamem.memory.exchange.requests import Requests, StreamRequest
from megamem.parallel.layout import owner_range, rows_per_owner
from megamem_kernels.formats import row_fields

FP8 = row_fields("fp8", 33)
BF16 = row_fields("bf16", 7)


@pytest.mark.parametrize(("limit", "dtype"), [(0, torch.int32), (2**31, torch.int32), (2**31 + 1, torch.int64)])
def test_ids_travel_in_32_bits_where_they_fit(limit: int, dtype: torch.dtype) -> None:
    field = id_field(limit)
    assert field.dtype == dtype
    if limit:
        assert torch.tensor([limit - 1]).to(field.dtype).item() == limit - 1


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("rows", [(0, 0), (1, 0), (5, 3), (64, 1)])
def test_blocks_do_not_overlap_and_keep_what_is_written(checked: bool, rows: tuple[int, int]) -> None:
    form = Form((Section("stream a", (id_field(9), *FP8)), Section("stream b", BF16)), checked)
    message = torch.full((form.nbytes(rows),), 255, dtype=torch.uint8)
    assert len(message) % 8 == 0
    written = []
    for section in form.blocks(message, rows):
        for block in section:
            raw = torch.randint(0, 255, (block.nbytes,), dtype=torch.uint8)
            block.view(torch.uint8).view(-1).copy_(raw)
            written.append(raw)
    form.seal(message, rows, 7)
    again = [block for section in form.blocks(message, rows) for block in section]
    assert [tuple(block.shape) for block in again] == [(rows[0],), (rows[0], 33), (rows[0], 2), (rows[1], 7)]
    for block, raw in zip(again, written, strict=True):
        assert torch.equal(block.view(torch.uint8).view(-1), raw)
    assert form.damaged(message, rows, 7) is None


def test_damage_is_found_in_every_byte_and_named() -> None:
    form, rows = Form((Section("stream a", FP8), Section("stream b", BF16)), True), (3, 2)
    message = torch.arange(form.nbytes(rows), dtype=torch.uint8)
    form.seal(message, rows, 7)
    end_of_a = form.sections[0].nbytes(rows[0]) + 8
    for byte in range(len(message)):
        damaged = message.clone()
        damaged[byte] ^= 1 << byte % 8
        assert form.damaged(damaged, rows, 7) == ("stream a" if byte < end_of_a else "stream b")
    assert form.damaged(message, rows, 8) == "stream a"


def test_without_checksums_a_message_still_has_to_be_the_right_one_and_whole() -> None:
    form, rows = Form((Section("stream a", FP8), Section("stream b", BF16)), False), (3, 2)
    message = torch.arange(form.nbytes(rows), dtype=torch.uint8)
    form.seal(message, rows, 7)
    message[0] ^= 1
    assert form.damaged(message, rows, 7) is None
    assert form.damaged(message, rows, 8) == "stream a"
    message[-8:] = 0
    assert form.damaged(message, rows, 7) == "stream b"


def test_checksum_depends_on_order_place_and_length() -> None:
    words = np.array([1, 2, 3, 0, 0], dtype=np.uint64)
    variants = [words, words[::-1].copy(), words[:4], np.roll(words, 1), words[[1, 0, 2, 3, 4]], words[:0]]
    assert len({int(checksum(variant)) for variant in variants}) == len(variants)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("ids", "bad"), [([], -1), ([0, 4, 9], -1), ([0, 4, 10], 2), ([-1, 4], 0), ([3, 3], 1), ([3, 2, 4], 1)]
)
def test_ids_are_admitted_while_they_ascend_in_range(ids: list[int], bad: int, dtype: type) -> None:
    out = np.full(len(ids), -7, dtype=np.int64)
    assert admit(np.array(ids, dtype=dtype), 10, out) == bad
    assert out.tolist()[: bad if bad >= 0 else None] == ids[: bad if bad >= 0 else None]


def test_admitted_ids_may_be_beyond_31_bits() -> None:
    ids = np.array([2**31 - 1, 2**31, 2**40])
    out = np.empty(3, dtype=np.int64)
    assert admit(ids, 2**40 + 1, out) == -1 and np.array_equal(out, ids)
    assert admit(ids, 2**40, out) == 2


def test_marks_accumulate_and_count_every_asker() -> None:
    asked = [np.array([2, 5, 9]), np.empty(0, dtype=np.int64), np.array([1, 5])]
    request = StreamRequest([slice(0, 0)] * 3, asked, 10)
    assert request.distinct.tolist() == [1, 2, 5, 9]
    assert [inverse.tolist() for inverse in request.inverse] == [[1, 2, 3], [], [0, 2]]
    requests = Requests(({"a": request},), {"a": 2})
    requests.mark("a", np.array([0, 3, 4]))
    assert requests.dirty == 0
    requests.mark("a", np.array([5, 7]))
    assert requests.dirty == 4  # row 5 of two tables on two ranks
    requests.mark("a", np.array([0, 1, 9]))
    assert requests.dirty == 8


def test_common_ids_at_both_ends() -> None:
    flags = np.zeros(3, dtype=np.uint8)
    mark_common(flags, np.array([1, 4, 8]), np.array([0, 1, 8, 9]))
    assert flags.tolist() == [1, 0, 1]
    mark_common(flags[:0], np.empty(0, dtype=np.int64), np.array([3]))


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 3), (2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("rows", [1, 5, 64, 2**33])
def test_hops_lead_every_position_to_its_owner(nodes: int, per_node: int, rows: int) -> None:
    """Follows ids by arithmetic alone, on all ranks, over one hop and over two."""
    size, share = nodes * per_node, rows_per_owner(rows, nodes * per_node)
    ids = np.unique(np.random.default_rng(0).integers(0, rows, 40))

    def hops_of(rank: int, layout: NodeLayout | None) -> tuple:
        return build_hops(
            rank, size, Link(None), layout, workspace=Workspace(), store_device=CPU, wire_device=CPU, checked=True
        )

    for layout in (None, NodeLayout(per_node, Link(None), Link(None))):
        reached = []
        for rank in range(size):
            first, *second = hops_of(rank, layout)
            orders, coordinates = first.cut(ids, first.counts(ids, share), share)
            places = np.concatenate([np.arange(len(ids))[order] for order in orders])
            assert sorted(places.tolist()) == list(range(len(ids)))
            for peer, (order, at_peer) in enumerate(zip(orders, coordinates, strict=True)):
                assert (np.diff(at_peer) > 0).all()
                assert not len(at_peer) or 0 <= at_peer[0] <= at_peer[-1] < first.limit(peer, rows, size)
                if not second:
                    reached += [
                        (first.members[peer], int(local), int(i)) for local, i in zip(at_peer, ids[order], strict=True)
                    ]
                    continue
                relay = hops_of(first.members[peer], layout)[1]
                _, onward = relay.cut(at_peer, relay.counts(at_peer, share), share)
                asked = ids[order]
                for member, local in zip(relay.members, onward, strict=True):
                    assert not len(local) or local[-1] < relay.limit(relay.members.index(member), rows, size)
                    reached += [(member, int(x), int(i)) for x, i in zip(local, asked, strict=False)]
                    asked = asked[len(local) :]
        assert len(reached) == size * len(ids)
        for owner, local, position in reached:
            owned = owner_range(rows, size, owner)
            assert position in owned and local == position - owned.start


@pytest.mark.parametrize(
    ("hosts", "expected", "logged"),
    [
        ([7, 7, 7, 7], None, False),
        ([1, 2, 3], None, False),
        ([1, 1, 2, 2, 9, 9], 2, False),
        ([1, 1, 1, 2, 2], None, True),
        ([1, 2, 1, 2, 1, 1], None, True),
        ([1, 1, 2, 2, 1, 1], None, True),
    ],
)
def test_two_hops_need_equal_nodes(
    hosts: list[int], expected: int | None, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert equal_nodes(hosts) == expected
    assert bool(caplog.records) == logged
