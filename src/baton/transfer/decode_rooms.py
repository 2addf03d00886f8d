"""The receiving side's rooms: a state machine without sockets, threads or clocks of its own.

The rank's calls (`receive`, `abort`) and the peers' frames come in here; what must be sent goes out through `DecodePeer`,
what the rank must hear through `emit`. Neighbours: `decode_route` is the real source, `decode_session` the real peer, `decode` the
thread around them.

A room has a leg for each rank of the prefill worker from which some part of its pages comes. It has arrived when all legs have, and
a leg that fails fails it.

This process is the only writer of its own pool: in shared memory it copies pages out of the prefill's pool, over TCP it
reads them from its own socket. So when a room fails, for whatever reason, its pages are free as soon as our own threads
have let go of them (`busy == 0`, at most one page later) and no answer of the prefill is needed. A prefill that hangs can
hold nothing of ours, one that has gone mad can overwrite nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.protocol.errors import ErrorInfo
from baton.transfer.base import NO_TOKEN, Event, Failed, FirstToken, Received
from baton.transfer.errors import TransferError, aborted, broken, peer_aborted, timed_out
from baton.transfer.stats import TransferStats
from baton.transfer.timers import Timer, Timers


class DecodePeer(Protocol):
    """One session with a prefill rank."""

    moves_pages: bool
    """False: it carries nothing of a page, and its rooms end with the last word alone."""

    def notify(self, state: "DecodeRoom") -> None:
        """Send the room's notice."""

    def release(self, state: "DecodeRoom") -> None:
        """Write nothing into the room's pages from now on, except in jobs counted by `busy`."""

    def ack(self, transfer_id: int) -> None: ...

    def cancel(self, transfer_id: int, reason: str) -> None: ...

    def cancelled(self, transfer_id: int) -> None: ...


class DecodeSource(Protocol):
    """The way to an engine of a prefill worker, connected or not yet."""

    name: str
    """host:port of its bootstrap server."""

    def open(self, state: "DecodeRoom") -> None:
        """Call `DecodeRooms.connected` now or when connected. May call `lost` before it returns."""


@dataclass(slots=True, eq=False)
class Leg:
    """What comes from one prefill rank."""

    peer: DecodePeer
    arrived: bytearray
    """Per page: 1 when it was claimed by a frame (a page comes once)."""
    num_arrived: int = 0
    num_verified: int = 0
    is_over: bool = False
    """Its last word is here."""
    owes_cancelled: bool = False
    """The prefill asked us to stop and waits for the answer."""

    @property
    def is_complete(self) -> bool:
        return self.is_over and self.num_verified == len(self.arrived)


@dataclass(slots=True, eq=False)
class DecodeRoom:
    room: int
    source: DecodeSource
    transfer_id: int
    first_page_idx: int
    page_ids: Sequence[int]
    received_s: float
    legs: dict[DecodePeer, Leg] = field(default_factory=dict)
    """Empty until connected: the prefill does not know the room yet."""
    noticed_s: float | None = None
    """When the notices were sent."""
    first_data_s: float | None = None
    first_token: FirstToken | None = None
    busy: int = 0
    """Jobs that may touch pages right now."""
    failure: ErrorInfo | None = None
    timer: Timer | None = None


class DecodeRooms:
    def __init__(self, page_bytes: int, timers: Timers, emit: Callable[[Event], None], *, leads: bool = True) -> None:
        """`leads`: this is rank 0 of its worker, to which the prefill's first token comes."""
        self.stats = TransferStats()
        self._page_bytes = page_bytes
        self._timers = timers
        self._emit = emit
        self._leads = leads
        self._rooms: dict[int, DecodeRoom] = {}
        self._by_transfer: dict[int, DecodeRoom] = {}
        self._next_transfer_id = 1

    @property
    def num_open(self) -> int:
        return len(self._rooms)

    # From the rank

    def receive(
        self, room: int, source: DecodeSource, first_page_idx: int, page_ids: Sequence[int], timeout_s: float
    ) -> None:
        transfer_id, self._next_transfer_id = self._next_transfer_id, self._next_transfer_id + 1
        state = DecodeRoom(room, source, transfer_id, first_page_idx, page_ids, self._timers.now())
        self._rooms[room] = self._by_transfer[transfer_id] = state
        state.timer = self._timers.call_later(timeout_s, lambda: self._timeout(state, timeout_s))
        source.open(state)

    def stop(self, room: int, error: ErrorInfo) -> None:
        """Fail a room, whatever its state; unknown ones are ignored (they have ended)."""
        if (state := self._rooms.get(room)) is not None:
            self.fail(state, error)

    # From the source and its sessions

    def move(self, state: DecodeRoom, source: DecodeSource) -> None:
        """`source` is who has the room; the one before has not told its peers of it."""
        state.source = source
        source.open(state)

    def connected(self, state: DecodeRoom, peers: Sequence[DecodePeer]) -> None:
        """Give notice to all peers."""
        if state.failure is None:
            for peer in peers:
                state.legs[peer] = Leg(peer, bytearray(len(state.page_ids) if peer.moves_pages else 0))
            state.noticed_s = self._timers.now()
        for peer in peers:
            peer.notify(state)
            if state.failure is not None:
                # Given up while we were connecting: the prefill must not wait for a decode side that will never come.
                peer.cancel(state.transfer_id, state.failure.message)

    def claim(self, peer: DecodePeer, transfer_id: int, page_idx: int, num_pages: int) -> DecodeRoom | None:
        """The room into which these pages may be written now; None: let them go (the room has ended or just failed)."""
        state, leg = self._find(peer, transfer_id)
        if state is None or leg is None or state.failure is not None:
            return None
        first = page_idx - state.first_page_idx
        if first < 0 or first + num_pages > len(leg.arrived):
            self.fail(state, broken(f"prefill sent page {page_idx} (+{num_pages}), which nobody asked for"))
            return None
        if any(leg.arrived[first : first + num_pages]) or leg.is_over:
            self.fail(state, broken(f"prefill sent page {page_idx} twice or after the last one"))
            return None
        leg.arrived[first : first + num_pages] = b"\1" * num_pages
        leg.num_arrived += num_pages
        if state.first_data_s is None:
            state.first_data_s = self._timers.now()
        return state

    def begin(self, state: DecodeRoom) -> None:
        state.busy += 1

    def done(self, state: DecodeRoom, peer: DecodePeer, num_verified: int, error: ErrorInfo | None) -> None:
        """A job ended: `num_verified` pages of the peer's are in place and intact, or `error` says why not."""
        state.busy -= 1
        state.legs[peer].num_verified += num_verified
        if error is not None:
            self.fail(state, error)
        self._try_end(state)

    def last(self, peer: DecodePeer, transfer_id: int, num_pages: int, first_token: FirstToken | None) -> None:
        state, leg = self._find(peer, transfer_id)
        if state is None or leg is None or state.failure is not None:
            return
        wanted = len(leg.arrived)
        if num_pages != wanted or leg.num_arrived != num_pages:
            self.fail(state, broken(f"prefill ended after {leg.num_arrived} of {wanted} pages (says {num_pages})"))
            return
        leg.is_over = True
        state.first_token = first_token or state.first_token
        self._try_end(state)

    def cancel(self, peer: DecodePeer, transfer_id: int, reason: str) -> None:
        """The prefill gives up (or refuses); it waits for `cancelled`, whatever state we are in."""
        state, leg = self._find(peer, transfer_id)
        if state is None or leg is None:
            peer.cancelled(transfer_id)
            return
        leg.owes_cancelled = True
        self.fail(state, peer_aborted("prefill", reason))

    def fail(self, state: DecodeRoom, error: ErrorInfo) -> None:
        """Stop the room; its end follows when our own jobs have let go of its pages."""
        if state.failure is None and self._rooms.get(state.room) is state:
            state.failure = error
            for peer in state.legs:
                peer.release(state)
            self._try_end(state)

    def lost(self, source: DecodeSource, reason: str) -> None:
        """The way to the prefill worker is closed, or could not be made."""
        for state in [state for state in self._rooms.values() if state.source is source]:
            self.fail(state, broken(reason))

    def close(self, reason: str) -> None:
        for state in list(self._rooms.values()):
            self.fail(state, aborted(reason))

    # Inside

    def _find(self, peer: DecodePeer, transfer_id: int) -> tuple[DecodeRoom, Leg] | tuple[None, None]:
        """Nones for a transfer that has ended. A number that was never given out breaks the session."""
        if not 0 < transfer_id < self._next_transfer_id:
            raise TransferError(f"unknown transfer id {transfer_id}")
        state = self._by_transfer.get(transfer_id)
        if state is None:
            return None, None
        if (leg := state.legs.get(peer)) is None:
            raise TransferError(f"transfer id {transfer_id} belongs to another session")
        return state, leg

    def _timeout(self, state: DecodeRoom, timeout_s: float) -> None:
        state.timer = None
        where = "the prefill could not be reached" if state.noticed_s is None else "the KV did not arrive"
        text = f"Decode transfer of bootstrap_room {state.room} from {state.source.name} timed out: {where}"
        self.fail(state, timed_out(f"{text} within {timeout_s:g} s"))

    def _try_end(self, state: DecodeRoom) -> None:
        if state.busy or self._rooms.get(state.room) is not state:
            return
        if state.failure is not None:
            self._end(state)
            for leg in state.legs.values():
                if leg.owes_cancelled:
                    leg.peer.cancelled(state.transfer_id)
                else:
                    leg.peer.cancel(state.transfer_id, state.failure.message)
            self.stats = self.stats.failed()
            self._emit(Failed(state.room, state.failure))
        elif state.legs and all(leg.is_complete for leg in state.legs.values()):
            if self._leads and state.first_token is None:
                self.fail(state, broken("prefill sent no first token"))
                return
            self._end(state)
            for leg in state.legs.values():
                leg.peer.ack(state.transfer_id)
            self._emit(self._received(state))

    def _received(self, state: DecodeRoom) -> Received:
        now = self._timers.now()
        num_bytes = len(state.page_ids) * self._page_bytes
        duration_s = 0.0 if state.first_data_s is None else now - state.first_data_s
        bootstrap_s = 0.0 if state.noticed_s is None else state.noticed_s - state.received_s
        self.stats = self.stats.succeeded(num_bytes, duration_s, bootstrap_s)
        return Received(state.room, state.first_token or NO_TOKEN, num_bytes, duration_s, bootstrap_s)

    def _end(self, state: DecodeRoom) -> None:
        if state.timer is not None:
            state.timer.cancel()
            state.timer = None
        del self._rooms[state.room]
        del self._by_transfer[state.transfer_id]
