"""A prefill worker of several data-parallel engines: a room's pages come from engine room % dp_size, whatever the decode knew before."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.fakes.transfer_pair import FIRST_TOKEN, Pair, bootstrap_server, open_pair

from baton.transfer.base import Bootstrapped, Received, Sent
from baton.transfer.config import TransferConfig, TransferConfigError


@pytest.fixture
def port() -> Iterator[int]:
    with bootstrap_server() as port:
        yield port


def open_engines(stack: ExitStack, port: int, dp_size: int) -> list[Pair]:
    """`dp_size` engines; pages of engine k hold the byte k + 1. Only the first one's decode side is used."""
    pairs = [stack.enter_context(open_pair("tcp", port, dp_size=dp_size, dp_rank=rank)) for rank in range(dp_size)]
    for rank, pair in enumerate(pairs):
        pair.source.array[:] = rank + 1
    return pairs


def hand_over(engines: list[Pair], decode: Pair, room: int) -> int:
    """Whose page arrived."""
    engine = engines[room % len(engines)]
    engine.prefill.transfer.expect(room, 60.0)
    decode.receive(room, [room % 16])
    engine.prefill.wait(room, Bootstrapped)
    engine.prefill.transfer.send(room, 0, [3], FIRST_TOKEN)
    assert isinstance(decode.decode.wait(room), Received)
    assert isinstance(engine.prefill.wait(room), Sent)
    page = decode.target.array[room % 16]
    assert (page == page[0]).all()
    return int(page[0]) - 1


def test_rooms_are_met_on_their_engine(port: int) -> None:
    with ExitStack() as stack:
        engines = open_engines(stack, port, 3)
        # The first room finds out how many engines there are, on an engine that is not its own.
        assert [hand_over(engines, engines[0], room) for room in (5, 4, 3, 2, 8, 2**62)] == [2, 1, 0, 2, 2, 1]
        assert sorted(group for _, group in engines[0].decode.transfer.session_modes()) == [0, 1, 2]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_a_worker_that_comes_back_with_other_engines_is_met_again(port: int, before: int, after: int) -> None:
    with ExitStack() as stack:
        first = open_engines(stack, port, before)
        for room in range(before):
            hand_over(first, first[0], room)
        for one in first:
            one.prefill.transfer.close()
        while first[0].decode.transfer.session_modes():
            pass  # its thread has not seen the end yet; asking waits for it
        second = open_engines(stack, port, after)
        for room in (11, 10, 9):
            assert hand_over(second, first[0], room) == room % after


def test_an_engine_that_cannot_be_is_named() -> None:
    with pytest.raises(TransferConfigError, match=r"dp_rank must be in \[0, dp_size = 2\), got 2"):
        TransferConfig(dp_size=2, dp_rank=2)
