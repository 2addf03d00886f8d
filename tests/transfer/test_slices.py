"""Workers whose ranks hold different parts of a page: who sends what to whom, and that every byte arrives where it belongs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.transfer_pair import FIRST_TOKEN
from tests.fakes.transfer_ranks import cut, layout_of, open_ranks, tensor_slices

from baton.transfer.base import NO_TOKEN, Bootstrapped, Failed, PageLayout, Received, Sent
from baton.transfer.errors import TransferError
from baton.transfer.slices import Slice, check_whole, part_of_pages, plan_links, slice_bytes, whole_slice


@st.composite
def workers(draw: st.DrawFn) -> tuple[PageLayout, list[Slice], list[Slice]]:
    layout = layout_of(draw(st.integers(1, 7)), draw(st.integers(1, 8)))
    borders = st.lists(st.integers(1, max(1, layout.num_layers - 1)), max_size=layout.num_layers - 1, unique=True)
    sides = [tensor_slices(layout, draw(st.integers(1, 9)), sorted(draw(borders))) for _ in range(2)]
    return layout, sides[0], sides[1]


@settings(deadline=None)
@given(workers())
def test_every_target_gets_each_of_its_bytes_once(cuts: tuple[PageLayout, list[Slice], list[Slice]]) -> None:
    layout, sources, targets = cuts
    check_whole(sources, layout)
    shape = 3, slice_bytes(layout, whole_slice(layout))
    whole = np.random.default_rng(1).integers(1, 256, shape, dtype=np.uint8)
    held = [cut(whole, layout, part) for part in sources]
    arrived = [np.zeros((3, slice_bytes(layout, part)), np.uint8) for part in targets]
    links = plan_links(sources, targets)
    for link in links:
        if not link.part.is_empty:
            target = part_of_pages(arrived[link.target], layout, targets[link.target], link.part)
            assert not target.any(), "these bytes came before"
            target[:] = part_of_pages(held[link.source], layout, sources[link.source], link.part)
    for part, pages in zip(targets, arrived, strict=True):
        assert np.array_equal(pages, cut(whole, layout, part))
    assert {link.source for link in links} == set(range(len(sources))), "every source hears of every room"
    assert (links[0].source, links[0].target) == (0, 0), "the first token goes from leader to leader"
    assert len({(link.source, link.target) for link in links}) == len(links), "one session for each pair"


@settings(deadline=None)
@given(workers())
def test_replicas_share_the_work(cuts: tuple[PageLayout, list[Slice], list[Slice]]) -> None:
    """None sends more than another by more than one layer, to all ranks of one kind together."""
    _, sources, targets = cuts
    links = plan_links(sources, targets)
    for held in set(sources):
        replicas = [rank for rank, one in enumerate(sources) if one == held]
        for wanted in set(targets):
            takers = {rank for rank, one in enumerate(targets) if one == wanted}
            sent = [
                sum(link.part.num_cells for link in links if link.source == rank and link.target in takers)
                for rank in replicas
            ]
            num_heads = held.overlap(wanted).kv_heads[1] - held.overlap(wanted).kv_heads[0]
            assert max(sent) - min(sent) <= num_heads


@pytest.mark.parametrize("backend", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ((2, []), (1, [])),
        ((1, []), (2, [])),
        ((2, []), (3, [])),
        ((1, [2]), (3, [1])),
        ((6, []), (1, [])),
        ((3, []), (3, [])),
    ],
    ids=["2 to 1", "1 to 2", "2 to 3", "2 stages to 2 stages of 3", "6, two of a head, to 1", "3 to 3"],
)
def test_pages_arrive_in_every_ranks_pool(
    bootstrap_port: int, backend: str, prefill: tuple[int, list[int]], decode: tuple[int, list[int]]
) -> None:
    layout = layout_of(5, 3)
    sources, targets = tensor_slices(layout, *prefill), tensor_slices(layout, *decode)
    with open_ranks(bootstrap_port, layout, sources, targets, backend) as ranks:
        for room, (source_ids, target_ids) in enumerate([([1, 7, 4], [6, 0, 3]), ([2], [5]), ([], [])]):
            ranks.receive(room, target_ids)
            ranks.expect(room)
            for one in ranks.prefills:
                one.wait(room, Bootstrapped)
            ranks.send(room, source_ids[:1], None)
            for one in ranks.prefills:
                one.transfer.send(room, 1, source_ids[1:], FIRST_TOKEN)
            ends = [one.wait(room, Received, Failed) for one in ranks.decodes]
            assert all(isinstance(end, Received) for end in ends), ends
            assert [end.first_token for end in ends] == [FIRST_TOKEN] + [NO_TOKEN] * (len(targets) - 1)
            sent = [one.wait(room, Sent, Failed) for one in ranks.prefills]
            assert all(isinstance(end, Sent) for end in sent), sent
            assert sum(end.num_bytes for end in sent) == sum(end.num_bytes for end in ends)
            for part, pool in ranks.targets:
                wanted = cut(ranks.whole[source_ids], layout, part)
                assert np.array_equal(pool.array[target_ids], wanted)
                assert not np.delete(pool.array, [6, 0, 3, 5], axis=0).any()
        assert set(ranks.decodes[0].transfer.session_modes().values()) == {backend}


def test_slices_that_are_no_page_are_refused() -> None:
    layout = layout_of(2, 2)
    for slices in (
        [Slice((0, 2), (0, 1))],
        [Slice((0, 2), (0, 2)), Slice((0, 1), (0, 1))],
        [Slice((0, 3), (0, 2))],
        [Slice((0, 2), (-1, 1)), Slice((0, 2), (1, 2))],
    ):
        with pytest.raises(TransferError, match="the ranks do not hold 2 layers of 2 kv heads between them"):
            check_whole(slices, layout)
