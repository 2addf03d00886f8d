"""The two room machines against each other, over a simulated session, in every order hypothesis can think of.

After each step: no room has two ends, and no page of an ended room is in anybody's hands. At the end everything is
delivered, the session is lost and time passes: then every room has exactly one end and nothing is remembered.
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


@dataclass
class Link:
    """A session: both peers, two ordered queues, the prefill's pump and the decode's copies."""

    machine: "TransferMachine"
    to_prefill: deque[Callable[[], None]] = field(default_factory=deque)
    to_decode: deque[Callable[[], None]] = field(default_factory=deque)
    jobs: deque[SendJob] = field(default_factory=deque)
    running: SendJob | None = None
    copies: list[Copy] = field(default_factory=list)
    up: bool = True
    name: str = "link"
    worker: str = "decode"
    num_takers: int = 1

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    # Both sides' peer methods

    def enqueue(self, job: SendJob) -> None:
        self.jobs.append(job)

    def drop(self, reason: str) -> None:
        self.lose()

    def notify(self, state: DecodeRoom) -> None:
        tid, room, first, count = state.transfer_id, state.room, state.first_page_idx, len(state.page_ids)
        self.to_prefill.append(lambda: self.machine.prefill.notice(self, tid, room, first, count))

    def release(self, state: DecodeRoom) -> None:
        pass

    def ack(self, transfer_id: int) -> None:
        self.to_prefill.append(lambda: self.machine.prefill.ack(self, transfer_id))

    def cancelled(self, transfer_id: int) -> None:
        self.to_prefill.append(lambda: self.machine.prefill.cancelled(self, transfer_id))

    # Cancel goes either way; the two sides see the same object, so the direction is told by who asks.
    def cancel(self, transfer_id: int, reason: str) -> None:
        self.to_decode.append(lambda: self.machine.decode.cancel(self.decode_side, transfer_id, reason))

    def __post_init__(self) -> None:
        self.decode_side = DecodeSide(self)

    def step_job(self) -> None:
        """Begin the next job, or finish the running one (its pages are announced, then its last word)."""
        prefill = self.machine.prefill
        if self.running is None:
            if self.jobs and prefill.begin(self.jobs[0].room):
                self.running = self.jobs.popleft()
            elif self.jobs:
                self.jobs.popleft()
            return
        job, self.running = self.running, None
        if job.room.failure is None and self.up:
            tid = job.room.transfer_id
            for offset in range(len(job.page_ids)):
                self.to_decode.append(lambda idx=job.first_page_idx + offset: self.page(tid, idx))
            if job.first_token is not None:
                count = job.room.num_pages
                self.to_decode.append(lambda: self.machine.decode.last(self.decode_side, tid, count, FIRST_TOKEN))
        prefill.done(job.room)

    def page(self, transfer_id: int, page_idx: int) -> None:
        state = self.machine.decode.claim(self.decode_side, transfer_id, page_idx, 1)
        if state is not None:
            self.machine.decode.begin(state)
            self.copies.append(Copy(state))

    def finish_copy(self) -> None:
        if self.copies:
            self.machine.decode.done(self.copies.pop(0).state, self.decode_side, 1, None)

    def lose(self) -> None:
        if self.up:
            self.up = False
            self.to_prefill.clear()
            self.to_decode.clear()
            self.machine.prefill.lost(self, "lost")
            self.machine.decode.lost(self.decode_side, "lost")


class DecodeSide:
    """The link as the decode side's peer, and the way to it."""

    name = "link"
    moves_pages = True

    def __init__(self, link: Link) -> None:
        self._link = link
        self.notify, self.release, self.ack, self.cancelled = link.notify, link.release, link.ack, link.cancelled

    def open(self, state: DecodeRoom) -> None:
        self._link.machine.decode.connected(state, [self])

    def cancel(self, transfer_id: int, reason: str) -> None:
        link = self._link
        link.to_prefill.append(lambda: link.machine.prefill.cancel(link, transfer_id, reason))


class TransferMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.prefill_events: list[Event] = []
        self.decode_events: list[Event] = []
        self.prefill = PrefillRooms(CONFIG, self.clock.timers(), self.prefill_events.append)
        self.decode = DecodeRooms(100, self.clock.timers(), self.decode_events.append)
        self.link = Link(self)
        self.all_links = [self.link]
        self.expected: Counter[int] = Counter()
        self.received: Counter[int] = Counter()

    def ends(self, events: list[Event]) -> Counter[int]:
        return Counter(event.room for event in events if not isinstance(event, Bootstrapped))

    def open_rooms(self, asked: Counter[int], events: list[Event]) -> set[int]:
        return {room for room, count in asked.items() if count > self.ends(events)[room]}

    @rule(room=ROOMS)
    def expect(self, room: int) -> None:
        if room not in self.open_rooms(self.expected, self.prefill_events):
            self.expected[room] += 1
            self.prefill.expect(room, 50)

    @rule(room=ROOMS, first=st.integers(0, NUM_PAGES))
    def receive(self, room: int, first: int) -> None:
        if room not in self.open_rooms(self.received, self.decode_events):
            self.received[room] += 1
            self.decode.receive(room, self.link.decode_side, first, range(first, NUM_PAGES), 80)

    @rule(room=ROOMS, count=st.integers(0, NUM_PAGES), last=st.booleans())
    def send(self, room: int, count: int, last: bool) -> None:
        state = self.prefill._rooms.get(room)
        if state is None or not state.has_all_takers or state.last_queued or not state.expected:
            return
        start = state.first_page_idx + state.num_sent
        stop = NUM_PAGES if last else min(NUM_PAGES, start + count)
        self.prefill.send(room, start, range(start, stop), FIRST_TOKEN if last else None)

    @rule(room=ROOMS, now=RARELY | st.just(True))
    def abort_prefill(self, room: int, now: bool) -> None:
        if now:
            self.prefill.stop(room, FAILED)

    @rule(room=ROOMS, now=RARELY | st.just(True))
    def abort_decode(self, room: int, now: bool) -> None:
        if now:
            self.decode.stop(room, FAILED)

    @rule()
    def deliver_to_prefill(self) -> None:
        if self.link.to_prefill:
            self.link.to_prefill.popleft()()

    @rule()
    def deliver_to_decode(self) -> None:
        if self.link.to_decode:
            self.link.to_decode.popleft()()

    @rule()
    def pump(self) -> None:
        self.link.step_job()

    @rule()
    def copy(self) -> None:
        self.link.finish_copy()

    @rule(room=ROOMS, first=st.integers(0, NUM_PAGES))
    def start(self, room: int, first: int) -> None:
        self.receive(room, first)
        self.expect(room)

    @rule(steps=st.integers(1, 12), copy=st.booleans())
    def work(self, steps: int, copy: bool) -> None:
        for _ in range(steps):
            self.deliver_to_prefill()
            self.pump()
            self.deliver_to_decode()
            if copy:
                self.copy()

    @rule(seconds=st.sampled_from([1.0, 11.0, 60.0, 120.0]), now=RARELY)
    def pass_time(self, seconds: float, now: bool) -> None:
        if now:
            self.clock.advance(seconds)
        self.reconnect()

    @rule(now=RARELY)
    def lose_session(self, now: bool) -> None:
        if now:
            self.link.lose()
            self.reconnect()

    def reconnect(self) -> None:
        if not self.link.up:
            self.link = Link(self)
            self.all_links.append(self.link)

    @invariant()
    def one_end_per_room(self) -> None:
        for asked, events in ((self.expected, self.prefill_events), (self.received, self.decode_events)):
            assert all(count <= asked[room] for room, count in self.ends(events).items())

    @invariant()
    def nobody_holds_pages_of_an_ended_room(self) -> None:
        for link in self.all_links:
            for copy in link.copies:
                assert self.decode._rooms.get(copy.state.room) is copy.state
            if link.running is not None:
                assert self.prefill._rooms.get(link.running.room.room) is link.running.room

    @invariant()
    def prefill_keeps_pages_that_the_decode_side_reads(self) -> None:
        for copy in self.link.copies:
            owner = self.prefill._by_transfer.get((self.link, copy.state.transfer_id))
            assert owner is not None, "the prefill ended a room whose pages are being copied"

    @invariant()
    def sent_means_received(self) -> None:
        sent = Counter(event.room for event in self.prefill_events if isinstance(event, Sent))
        received = Counter(event.room for event in self.decode_events if isinstance(event, Received))
        assert all(count <= received[room] for room, count in sent.items())

    def teardown(self) -> None:
        for link in self.all_links:
            while link.to_prefill or link.to_decode or link.jobs or link.running or link.copies:
                for queue in (link.to_prefill, link.to_decode):
                    if queue:
                        queue.popleft()()
                link.step_job()
                link.finish_copy()
        self.link.lose()
        self.clock.advance(1000)
        assert self.ends(self.prefill_events) == +self.expected
        assert self.ends(self.decode_events) == +self.received
        assert self.prefill.num_open == self.decode.num_open == self.prefill.num_remembered == 0
        assert not self.prefill._by_transfer and not self.decode._by_transfer
        assert self.clock.num_pending == 0


FAILED = aborted("test")

TestTransferMachine = TransferMachine.TestCase
TestTransferMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
