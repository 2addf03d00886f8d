"""A prefill rank's room with two takers, the ranks of one decode worker: they come, fail and end one after the other."""

from dataclasses import dataclass, field

import pytest
from tests.fakes.timers import ManualClock
from tests.fakes.transfer_pair import FIRST_TOKEN

from baton.transfer.base import Bootstrapped, Event, Failed, Sent
from baton.transfer.config import TransferConfig
from baton.transfer.errors import aborted
from baton.transfer.prefill_rooms import PrefillRooms, SendJob

ROOM, ATTEMPT = 5, 1


@dataclass(eq=False)
class Peer:
    worker: str = "decode"
    num_takers: int = 2
    cancelled: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    num_jobs: int = 0

    def enqueue(self, job: SendJob) -> None:
        self.num_jobs += 1

    def cancel(self, transfer_id: int, reason: str) -> None:
        self.cancelled.append(reason)

    def drop(self, reason: str) -> None:
        self.dropped.append(reason)


class Bed:
    def __init__(self) -> None:
        self.clock, self.events = ManualClock(), list[Event]()
        config = TransferConfig(heartbeat_interval_s=5, heartbeat_max_failure=2)
        self.rooms = PrefillRooms(config, self.clock.timers(), self.events.append)
        self.one, self.other = Peer(), Peer()

    def notice(self, peer: Peer, attempt: int = ATTEMPT, first_page_idx: int = 0) -> None:
        self.rooms.notice(peer, attempt, ROOM, first_page_idx, 2)


@pytest.fixture
def bed() -> Bed:
    return Bed()


def test_it_begins_when_both_are_there_and_ends_when_both_have_everything(bed: Bed) -> None:
    bed.rooms.expect(ROOM, 60.0)
    bed.notice(bed.one)
    assert bed.events == []
    bed.notice(bed.other)
    assert bed.events == [Bootstrapped(ROOM, 0)]
    bed.rooms.send(ROOM, 0, [1, 2], FIRST_TOKEN)
    assert (bed.one.num_jobs, bed.other.num_jobs) == (1, 1)
    bed.rooms.ack(bed.other, ATTEMPT)
    assert len(bed.events) == 1
    bed.rooms.ack(bed.one, ATTEMPT)
    assert isinstance(bed.events[-1], Sent)


def test_one_that_gives_up_stops_the_other_and_is_not_asked_itself(bed: Bed) -> None:
    bed.rooms.expect(ROOM, 60.0)
    bed.notice(bed.one)
    bed.notice(bed.other)
    bed.rooms.cancel(bed.one, ATTEMPT, "no memory")
    assert (bed.one.cancelled, bed.other.cancelled) == ([], ["The decode side ended the transfer: no memory"])
    assert not isinstance(bed.events[-1], Failed), "the other may still be reading our pages"
    bed.rooms.cancelled(bed.other, ATTEMPT)
    assert isinstance(bed.events[-1], Failed)
    assert bed.rooms.num_open == 0


def test_only_those_that_do_not_answer_lose_their_session(bed: Bed) -> None:
    bed.rooms.expect(ROOM, 60.0)
    bed.notice(bed.one)
    bed.notice(bed.other)
    bed.rooms.stop(ROOM, aborted("stop"))
    bed.rooms.cancelled(bed.one, ATTEMPT)
    bed.clock.advance(10.0)
    assert (bed.one.dropped, len(bed.other.dropped)) == ([], 1)
    bed.rooms.lost(bed.other, "dropped")
    assert isinstance(bed.events[-1], Failed)


def test_one_that_has_everything_is_not_asked_to_stop(bed: Bed) -> None:
    bed.rooms.expect(ROOM, 60.0)
    bed.notice(bed.one)
    bed.notice(bed.other)
    bed.rooms.send(ROOM, 0, [1, 2], FIRST_TOKEN)
    bed.rooms.ack(bed.one, ATTEMPT)
    bed.rooms.lost(bed.one, "went away afterwards")
    bed.rooms.lost(bed.other, "died")
    assert bed.one.cancelled == []
    assert isinstance(bed.events[-1], Failed)


@pytest.mark.parametrize("has_come", [True, False])
def test_one_that_comes_after_the_end_is_told_at_once(bed: Bed, has_come: bool) -> None:
    bed.rooms.expect(ROOM, 60.0)
    if has_come:
        bed.notice(bed.one)
    bed.rooms.stop(ROOM, aborted("stop"))
    if has_come:
        bed.rooms.cancelled(bed.one, ATTEMPT)
    else:
        bed.notice(bed.one)
    assert isinstance(bed.events[-1], Failed)
    bed.notice(bed.other)
    assert (bed.one.cancelled, bed.other.cancelled) == (["stop"], ["stop"])
    assert bed.rooms.num_open == 0
    bed.notice(bed.one, ATTEMPT + 1)  # The room's next use has nothing to do with it.
    assert (len(bed.one.cancelled), bed.rooms.num_open) == (1, 1)


@pytest.mark.parametrize(
    ("stranger", "attempt", "first_page_idx"),
    [(Peer("another worker"), ATTEMPT, 0), (Peer(), ATTEMPT + 1, 0), (Peer(), ATTEMPT, 1)],
    ids=["of another worker", "of another attempt", "for other pages"],
)
def test_a_strangers_notice_is_refused(bed: Bed, stranger: Peer, attempt: int, first_page_idx: int) -> None:
    bed.notice(bed.one)
    bed.notice(stranger, attempt, first_page_idx)
    assert stranger.cancelled == ["bootstrap_room 5 is in use by another request"]
    bed.rooms.expect(ROOM, 60.0)
    bed.notice(bed.other)
    assert bed.events == [Bootstrapped(ROOM, 0)]
    third = Peer()
    bed.notice(third)
    assert len(third.cancelled) == 1
