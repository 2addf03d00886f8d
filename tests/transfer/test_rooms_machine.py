"""The two room machines against each other, over simulated sessions, in every order hypothesis can think of; one rank of each side, and
two of each, where every room spans four sessions.

After each step: no room has two ends on a rank, and no page of an ended room is in anybody's hands. At the end everything is
delivered, the sessions are lost and time passes: then every room has exactly one end on each rank and nothing is remembered.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.fakes.timers import ManualClock

from baton.transfer.base import Bootstrapped, Event, FirstToken, Received, Sent
from baton.transfer.config import TransferConfig
from baton.transfer.decode_rooms import DecodeRoom, DecodeRooms
from baton.transfer.errors import aborted
from baton.transfer.prefill_rooms import PrefillRooms, SendJob

ROOMS = st.integers(0, 1)
RARELY = st.integers(0, 9).map(lambda number: number == 9)
NUM_PAGES = 3
FIRST_TOKEN = FirstToken(token_id=7, cached_tokens=0)
CONFIG = TransferConfig(bootstrap_timeout_s=100, waiting_timeout_s=100, heartbeat_interval_s=5, heartbeat_max_failure=2)


@dataclass
class Copy:
    """A page that the decode side is copying out of the prefill's pool."""

    state: DecodeRoom


@dataclass(eq=False)
class Link:
    """A session of a prefill rank with a decode rank: both peers, two ordered queues, the prefill's pump and the decode's copies."""

    route: "Route"
    prefill: PrefillRooms
    num_takers: int
    to_prefill: deque[Callable[[], None]] = field(default_factory=deque)
    to_decode: deque[Callable[[], None]] = field(default_factory=deque)
    jobs: deque[SendJob] = field(default_factory=deque)
    running: SendJob | None = None
    copies: list[Copy] = field(default_factory=list)
    worker: str = "decode"

    # Both sides' peer methods

    def enqueue(self, job: SendJob) -> None:
        self.jobs.append(job)

    def drop(self, reason: str) -> None:
        self.route.lose()

    def notify(self, state: DecodeRoom) -> None:
        tid, room, first, count = state.transfer_id, state.room, state.first_page_idx, len(state.page_ids)
        self.to_prefill.append(lambda: self.prefill.notice(self, tid, room, first, count))

    def release(self, state: DecodeRoom) -> None:
        pass

    def ack(self, transfer_id: int) -> None:
        self.to_prefill.append(lambda: self.prefill.ack(self, transfer_id))

    def cancelled(self, transfer_id: int) -> None:
        self.to_prefill.append(lambda: self.prefill.cancelled(self, transfer_id))

    # Cancel goes either way; the two sides see the same object, so the direction is told by who asks.
    def cancel(self, transfer_id: int, reason: str) -> None:
        self.to_decode.append(lambda: self.route.decode.cancel(self.decode_side, transfer_id, reason))

    def __post_init__(self) -> None:
        self.decode_side = DecodeSide(self)

    def step_job(self) -> None:
        """Begin the next job, or finish the running one (its pages are announced, then its last word)."""
        prefill = self.prefill
        if self.running is None:
            if self.jobs and prefill.begin(self.jobs[0].room):
                self.running = self.jobs.popleft()
            elif self.jobs:
                self.jobs.popleft()
            return
        job, self.running = self.running, None
        if job.room.failure is None and self.route.up:
            tid = job.room.transfer_id
            for offset in range(len(job.page_ids)):
                self.to_decode.append(lambda idx=job.first_page_idx + offset: self.page(tid, idx))
            if job.first_token is not None:
                count = job.room.num_pages
                self.to_decode.append(lambda: self.route.decode.last(self.decode_side, tid, count, FIRST_TOKEN))
        prefill.done(job.room)

    def page(self, transfer_id: int, page_idx: int) -> None:
        state = self.route.decode.claim(self.decode_side, transfer_id, page_idx, 1)
        if state is not None:
            self.route.decode.begin(state)
            self.copies.append(Copy(state))

    def finish_copy(self) -> None:
        if self.copies:
            self.route.decode.done(self.copies.pop(0).state, self.decode_side, 1, None)


class DecodeSide:
    """The link as the decode side's peer."""

    moves_pages = True

    def __init__(self, link: Link) -> None:
        self._link = link
        self.notify, self.release, self.ack, self.cancelled = link.notify, link.release, link.ack, link.cancelled

    def cancel(self, transfer_id: int, reason: str) -> None:
        link = self._link
        link.to_prefill.append(lambda: link.prefill.cancel(link, transfer_id, reason))


class Route:
    """The way of a decode rank to all prefill ranks: lost as a whole."""

    name = "route"

    def __init__(self, decode: DecodeRooms, prefills: list[PrefillRooms], num_takers: int) -> None:
        self.decode = decode
        self.up = True
        self.links = [Link(self, prefill, num_takers) for prefill in prefills]

    def open(self, state: DecodeRoom) -> None:
        self.decode.connected(state, [link.decode_side for link in self.links])

    def lose(self) -> None:
        if self.up:
            self.up = False
            for link in self.links:
                link.to_prefill.clear()
                link.to_decode.clear()
            for link in self.links:
                link.prefill.lost(link, "lost")
            self.decode.lost(self, "lost")


RANKS = st.integers(0, 1)


class TransferMachine(RuleBasedStateMachine):
    num_ranks = 1
    """Of each side."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.prefill_events: list[list[Event]] = [[] for _ in range(self.num_ranks)]
        self.decode_events: list[list[Event]] = [[] for _ in range(self.num_ranks)]
        self.prefills = [PrefillRooms(CONFIG, self.clock.timers(), events.append) for events in self.prefill_events]
        self.decodes = [
            DecodeRooms(100, self.clock.timers(), events.append, leads=not rank)
            for rank, events in enumerate(self.decode_events)
        ]
        self.routes = [Route(decode, self.prefills, self.num_ranks) for decode in self.decodes]
        self.all_links = [link for route in self.routes for link in route.links]
        self.expected: Counter[int] = Counter()
        self.received: Counter[int] = Counter()

    @property
    def links(self) -> list[Link]:
        return [link for route in self.routes for link in route.links]

    def ends(self, events: list[Event]) -> Counter[int]:
        return Counter(event.room for event in events if not isinstance(event, Bootstrapped))

    def is_open(self, room: int, asked: Counter[int], sides: list[list[Event]]) -> bool:
        return any(asked[room] > self.ends(events)[room] for events in sides)

    # A worker's leader begins a room on all its ranks, and only when it has ended on all.

    @rule(room=ROOMS)
    def expect(self, room: int) -> None:
        if not self.is_open(room, self.expected, self.prefill_events):
            self.expected[room] += 1
            for prefill in self.prefills:
                prefill.expect(room, 50)

    @rule(room=ROOMS, first=st.integers(0, NUM_PAGES))
    def receive(self, room: int, first: int) -> None:
        if not self.is_open(room, self.received, self.decode_events):
            self.received[room] += 1
            for decode, route in zip(self.decodes, self.routes, strict=True):
                decode.receive(room, route, first, range(first, NUM_PAGES), 80)

    @rule(room=ROOMS, rank=RANKS, count=st.integers(0, NUM_PAGES), last=st.booleans())
    def send(self, room: int, rank: int, count: int, last: bool) -> None:
        prefill = self.prefills[rank % self.num_ranks]
        state = prefill._rooms.get(room)
        if state is None or not state.has_all_takers or state.last_queued or not state.expected:
            return
        start = state.first_page_idx + state.num_sent
        stop = NUM_PAGES if last else min(NUM_PAGES, start + count)
        prefill.send(room, start, range(start, stop), FIRST_TOKEN if last else None)

    @rule(room=ROOMS, rank=RANKS, now=RARELY | st.just(True))
    def abort_prefill(self, room: int, rank: int, now: bool) -> None:
        if now:
            self.prefills[rank % self.num_ranks].stop(room, FAILED)

    @rule(room=ROOMS, rank=RANKS, now=RARELY | st.just(True))
    def abort_decode(self, room: int, rank: int, now: bool) -> None:
        if now:
            self.decodes[rank % self.num_ranks].stop(room, FAILED)

    @rule(data=st.data())
    def deliver_to_prefill(self, data: st.DataObject) -> None:
        self.next_of(data, [link.to_prefill for link in self.links])

    @rule(data=st.data())
    def deliver_to_decode(self, data: st.DataObject) -> None:
        self.next_of(data, [link.to_decode for link in self.links])

    def next_of(self, data: st.DataObject, queues: list[deque[Callable[[], None]]]) -> None:
        if full := [queue for queue in queues if queue]:
            (data.draw(st.sampled_from(full)) if len(full) > 1 else full[0]).popleft()()

    @rule(number=st.integers(0, 3))
    def pump(self, number: int) -> None:
        self.links[number % len(self.links)].step_job()

    @rule(number=st.integers(0, 3))
    def copy(self, number: int) -> None:
        self.links[number % len(self.links)].finish_copy()

    @rule(room=ROOMS, first=st.integers(0, NUM_PAGES))
    def start(self, room: int, first: int) -> None:
        self.receive(room, first)
        self.expect(room)

    @rule(room=ROOMS, first=st.integers(0, NUM_PAGES), last=st.booleans())
    def start_and_send(self, room: int, first: int, last: bool) -> None:
        """Far enough into a room that its end may follow."""
        self.start(room, first)
        self.work(2, True)
        for rank in range(self.num_ranks):
            self.send(room, rank, 1, last)

    @rule(steps=st.integers(1, 12), copy=st.booleans())
    def work(self, steps: int, copy: bool) -> None:
        for _ in range(steps):
            for link in self.links:
                for queue in (link.to_prefill, link.to_decode):
                    if queue:
                        queue.popleft()()
                link.step_job()
                if copy:
                    link.finish_copy()

    @rule(seconds=st.sampled_from([1.0, 11.0, 60.0, 120.0]), now=RARELY)
    def pass_time(self, seconds: float, now: bool) -> None:
        if now:
            self.clock.advance(seconds)
        self.reconnect()

    @rule(rank=RANKS, now=RARELY)
    def lose_sessions(self, rank: int, now: bool) -> None:
        if now:
            self.routes[rank % self.num_ranks].lose()
            self.reconnect()

    def reconnect(self) -> None:
        for rank, route in enumerate(self.routes):
            if not route.up:
                self.routes[rank] = Route(route.decode, self.prefills, self.num_ranks)
                self.all_links += self.routes[rank].links

    @invariant()
    def one_end_per_room(self) -> None:
        for asked, sides in ((self.expected, self.prefill_events), (self.received, self.decode_events)):
            for events in sides:
                assert all(count <= asked[room] for room, count in self.ends(events).items())

    @invariant()
    def nobody_holds_pages_of_an_ended_room(self) -> None:
        for link in self.all_links:
            for copy in link.copies:
                assert link.route.decode._rooms.get(copy.state.room) is copy.state
            if link.running is not None:
                assert link.prefill._rooms.get(link.running.room.room) is link.running.room

    @invariant()
    def prefill_keeps_pages_that_the_decode_side_reads(self) -> None:
        for link in self.links:
            for copy in link.copies:
                owner = link.prefill._by_transfer.get((link, copy.state.transfer_id))
                assert owner is not None, "the prefill ended a room whose pages are being copied"

    @invariant()
    def sent_means_received(self) -> None:
        """By every rank of the decode worker."""
        for ours in self.prefill_events:
            sent = Counter(event.room for event in ours if isinstance(event, Sent))
            for theirs in self.decode_events:
                received = Counter(event.room for event in theirs if isinstance(event, Received))
                assert all(count <= received[room] for room, count in sent.items())

    def teardown(self) -> None:
        while any(
            link.to_prefill or link.to_decode or link.jobs or link.running or link.copies for link in self.all_links
        ):
            for link in self.all_links:
                for queue in (link.to_prefill, link.to_decode):
                    if queue:
                        queue.popleft()()
                link.step_job()
                link.finish_copy()
        for route in self.routes:
            route.lose()
        self.clock.advance(1000)
        assert all(self.ends(events) == +self.expected for events in self.prefill_events)
        assert all(self.ends(events) == +self.received for events in self.decode_events)
        for prefill in self.prefills:
            assert prefill.num_open == prefill.num_remembered == 0
            assert not prefill._by_transfer
        assert not any(decode.num_open or decode._by_transfer for decode in self.decodes)
        assert self.clock.num_pending == 0


class RanksMachine(TransferMachine):
    num_ranks = 2


FAILED = aborted("test")

TestTransferMachine = TransferMachine.TestCase
TestTransferMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestRanksMachine = RanksMachine.TestCase
TestRanksMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
