"""What the cache hears of a store that is as many stores as ranks: every order of answers gives the same, and nothing comes early."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.distributed.control import GroupError
from baton.engine.distributed.messages import decode_event, decode_move, encode_event, encode_move
from baton.engine.distributed.tiers import Merge
from baton.kvcache.tiers import Cancel, Copies, Found, Late, PagesRead, Query, Read, StoreEvent, Write, Written

NUM_PAGES = 6


def events_of_a_read(op: int, ok: list[bool], cuts: list[int]) -> list[StoreEvent]:
    """One rank's answers, in batches that end at `cuts`."""
    borders = sorted({0, len(ok), *cuts})
    return [PagesRead(op, first, ok[first:end], end == len(ok)) for first, end in pairwise(borders)]


pages = st.lists(st.booleans(), min_size=NUM_PAGES, max_size=NUM_PAGES)
cuts = st.lists(st.integers(1, NUM_PAGES - 1), max_size=3)


@given(st.lists(st.tuples(pages, cuts, pages, st.integers(0, 9)), min_size=1, max_size=4), st.data())
def test_the_cache_hears_what_every_rank_can_stand_for(
    ranks: list[tuple[list[bool], list[int], list[bool], int]], data: st.DataObject
) -> None:
    merge = Merge(len(ranks))
    owed = [
        [*events_of_a_read(1, read, batches), Written(2, written), Found(3, found)]
        for read, batches, written, found in ranks
    ]
    heard: list[StoreEvent] = []
    answered = [0] * len(ranks)
    while waiting := [rank for rank, events in enumerate(owed) if events]:
        rank = data.draw(st.sampled_from(waiting))
        event = owed[rank].pop(0)
        if isinstance(event, PagesRead):
            answered[rank] = event.first + len(event.ok)
        merged = merge.add(rank, event)
        if merged is not None:
            heard.append(merged)
        if isinstance(merged, PagesRead):
            assert merged.first + len(merged.ok) == min(answered), "as soon as every rank has answered, and no sooner"
    reads = [event for event in heard if isinstance(event, PagesRead)]
    together = [all(one) for one in zip(*(read for read, _, _, _ in ranks), strict=True)]
    assert [ok for event in reads for ok in event.ok] == together
    assert [event.first for event in reads] == [sum(len(one.ok) for one in reads[:i]) for i in range(len(reads))]
    assert [event.is_last for event in reads] == [False] * (len(reads) - 1) + [True]
    assert [event for event in heard if not isinstance(event, PagesRead)] == [
        Written(2, [all(one) for one in zip(*(written for _, _, written, _ in ranks), strict=True)]),
        Found(3, min(found for _, _, _, found in ranks)),
    ]


def test_a_rank_that_skips_pages_is_named() -> None:
    merge = Merge(2)
    with pytest.raises(GroupError, match="rank 1 answered for page 2 of a read where 0 comes next"):
        merge.add(1, PagesRead(0, 2, [True], is_last=True))


def test_that_one_rank_is_late_is_heard_at_once() -> None:
    merge = Merge(2)
    assert merge.add(0, PagesRead(0, 0, [True], is_last=True)) is None
    assert merge.add(1, Late(0)) == Late(0)
    assert merge.add(1, PagesRead(0, 0, [True], is_last=True)) == PagesRead(0, 0, [True], is_last=True)


def test_orders_and_answers_cross_the_wire_whole() -> None:
    copies = Copies(saves=[(3, 70000), (1, 2)], loads=[(5, 4)])
    actions = [Query(1, [b"a", b"b"]), Read(2, [b"a"], [9]), Write(3, [b"c"], [70000]), Cancel(1)]
    assert decode_move(encode_move(copies, actions)) == (copies, actions)
    assert decode_move(encode_move(Copies(), [])) == (Copies(), [])
    for event in (Found(1, 7), PagesRead(2, 3, [True, False], False), Written(3, [True]), Late(4)):
        assert decode_event(encode_event(event)) == event
