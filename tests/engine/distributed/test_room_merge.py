"""What rank 0's scheduler hears of a room that several ranks take part in, each for itself."""

import pytest

from baton.engine.distributed.control import GroupError
from baton.engine.distributed.room_merge import RoomMerge
from baton.protocol.errors import ErrorInfo
from baton.transfer.base import NO_TOKEN, Bootstrapped, Event, Failed, FirstToken, Received, Sent

ROOM = 7
BROKEN, LATER = (
    ErrorInfo("TransferError", 500, text, stage="transfer", retryable=True) for text in ("broken", "later")
)
TOKEN = FirstToken(token_id=42, cached_tokens=3)


def heard(*events: tuple[int, Event], num_ranks: int = 2) -> tuple[list[Event], list[tuple[int, str]]]:
    """The scheduler's events and the rooms to abort, after the ranks' events in this order."""
    merge = RoomMerge(num_ranks)
    merge.open(ROOM)
    merged = [event for rank, one in events if (event := merge.add(rank, one)) is not None]
    ended = any(not isinstance(event, Bootstrapped) for event in merged)
    assert (ROOM in merge) is not ended
    return merged, merge.take_aborts()


def test_a_room_is_bootstrapped_and_sent_when_it_is_on_all_ranks() -> None:
    first = (1, Bootstrapped(ROOM, 2)), (0, Bootstrapped(ROOM, 2)), (0, Sent(ROOM, 100, 0.5))
    assert heard(*first[:1]) == ([], [])
    assert heard(*first) == ([Bootstrapped(ROOM, 2)], [])
    assert heard(*first, (1, Sent(ROOM, 50, 0.7)))[0][-1] == Sent(ROOM, 150, 0.7)


def test_the_leaders_first_token_counts() -> None:
    events = (1, Received(ROOM, NO_TOKEN, 50, 0.7, 0.1)), (0, Received(ROOM, TOKEN, 100, 0.5, 0.2))
    assert heard(*events) == ([Received(ROOM, TOKEN, 150, 0.7, 0.2)], [])


def test_a_rank_that_fails_stops_the_others_and_the_room_ends_when_all_have() -> None:
    failed = (1, Failed(ROOM, BROKEN))
    assert heard(failed) == ([], [(ROOM, "broken")])
    assert heard(failed, (0, Failed(ROOM, LATER))) == ([Failed(ROOM, BROKEN)], [(ROOM, "broken")])
    assert heard((0, Sent(ROOM, 1, 0.1)), failed) == ([Failed(ROOM, BROKEN)], []), "there is nobody left to stop"
    assert heard(failed, (0, Bootstrapped(ROOM, 0)), (0, Sent(ROOM, 1, 0.1)))[0] == [Failed(ROOM, BROKEN)]


def test_ranks_that_want_other_pages_fail_the_room() -> None:
    merged, aborts = heard((0, Bootstrapped(ROOM, 2)), (1, Bootstrapped(ROOM, 3)))
    assert (merged, aborts) == ([], [(ROOM, "the decode ranks do not want the same pages")])


def test_news_of_a_room_that_is_not_open_are_nonsense() -> None:
    merge = RoomMerge(2)
    with pytest.raises(GroupError, match="rank 1 says Sent of room 7"):
        merge.add(1, Sent(ROOM, 1, 0.1))
    merge.open(ROOM)
    merge.add(1, Sent(ROOM, 1, 0.1))
    with pytest.raises(GroupError, match="rank 1 says Failed of room 7"):
        merge.add(1, Failed(ROOM, BROKEN))
