"""The sending side's rooms: a state machine without sockets, threads or clocks of its own.

Who does what: the rank's calls (`expect`, `send`, `abort`) and the peer's frames (`notice`, `ack`, ...) come in here; what
must be sent goes out through `PrefillPeer`, what the rank must hear through `emit`. Neighbours: `prefill_session` is the
real peer, `prefill` the thread around both.

A room, from `expect` (or an early notice) to its one end event:

    expected ──notice──► bootstrapped ──send…──► last queued ──ack──► Sent
        │                     │                      │
        └──── failure (abort, time-out, peer's cancel, lost session) ──► stopping ──► Failed

A stopping room ends when `busy == 0` (our own thread reads no page of it) and no answer to our Cancel is outstanding (the
decode side, which reads our pages in shared memory, reads none either; a lost session counts as that answer, see
`decode_session`). Invariant: a room is in `_rooms` exactly until its end.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.protocol.errors import ErrorInfo
from baton.transfer.base import Bootstrapped, Event, Failed, FirstToken, Sent
from baton.transfer.config import TransferConfig
from baton.transfer.errors import TransferError, aborted, broken, peer_aborted, timed_out
from baton.transfer.stats import TransferStats
from baton.transfer.timers import Timer, Timers


class PrefillPeer(Protocol):
    """One session with a decode rank."""

    def enqueue(self, job: "SendJob") -> None: ...

    def cancel(self, transfer_id: int, reason: str) -> None: ...

    def drop(self, reason: str) -> None:
        """Close the session; `PrefillRooms.lost` follows."""


@dataclass(slots=True, eq=False)
class PrefillRoom:
    room: int
    expected: bool
    """The rank knows this room and is owed an end event; False: only the decode side's notice is here."""
    created_s: float
    peer: PrefillPeer | None = None
    transfer_id: int = 0
    first_page_idx: int = 0
    num_pages: int = 0
    noticed_s: float = 0.0
    num_sent: int = 0
    """Pages passed to `send` so far."""
    last_queued: bool = False
    send_started_s: float = 0.0
    num_bytes: int = 0
    busy: int = 0
    """Jobs that may read pages right now."""
    acked: bool = False
    failure: ErrorInfo | None = None
    awaits_cancelled: bool = False
    timer: Timer | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SendJob:
    """One `send` call, for the session's pump. The pump brackets its work with `begin` and `done`."""

    room: PrefillRoom
    first_page_idx: int
    page_ids: Sequence[int]
    first_token: FirstToken | None


@dataclass(frozen=True, slots=True)
class _Ended:
    """A room that ended before its other half came. That half, a notice or (if `by_peer`) a request, is answered at once
    and with that the room is forgotten; a second use of the number is a new room."""

    error: ErrorInfo
    by_peer: bool
    expires_s: float


class PrefillRooms:
    def __init__(self, config: TransferConfig, timers: Timers, emit: Callable[[Event], None]) -> None:
        self.stats = TransferStats()
        self._config = config
        self._timers = timers
        self._emit = emit
        self._rooms: dict[int, PrefillRoom] = {}
        self._by_transfer: dict[tuple[PrefillPeer, int], PrefillRoom] = {}
        # Oldest first, which is also the order of expiry: all live equally long.
        self._ended: OrderedDict[int, _Ended] = OrderedDict()

    @property
    def num_open(self) -> int:
        """Rooms that have not ended, rooms only noticed included."""
        return len(self._rooms)

    @property
    def num_remembered(self) -> int:
        self._forget_expired()
        return len(self._ended)

    # From the rank

    def expect(self, room: int, timeout_s: float) -> None:
        ended = self._ended.pop(room, None)
        known = self._rooms.get(room)
        if known is not None:
            known.expected = True
            if known.failure is None:
                self._bootstrapped(known)
        elif ended is not None and ended.by_peer and ended.expires_s > self._timers.now():
            self.stats = self.stats.failed()
            self._emit(Failed(room, ended.error))
        else:
            self._add(room, expected=True, timeout_s=timeout_s)

    def send(self, room: int, first_page_idx: int, page_ids: Sequence[int], first_token: FirstToken | None) -> None:
        state = self._rooms.get(room)
        if state is None or state.failure is not None:
            return  # It ended meanwhile; the rank finds the event in its next poll.
        if state.peer is None or state.last_queued:
            self.fail(state, broken("send() needs a Bootstrapped room whose last page was not sent yet"))
            return
        if problem := _misfit(state, first_page_idx, len(page_ids), first_token is not None):
            self.fail(state, broken(problem))
            return
        if state.num_sent == 0:
            state.send_started_s = self._timers.now()
        state.num_sent += len(page_ids)
        if first_token is not None:
            state.last_queued = True
            self._set_timer(state, self._config.waiting_timeout_s, "the decode side did not acknowledge the KV")
        state.peer.enqueue(SendJob(state, first_page_idx, page_ids, first_token))

    def stop(self, room: int, error: ErrorInfo) -> None:
        """Fail a room of the rank's, whatever its state; unknown ones are ignored (they have ended)."""
        if (state := self._rooms.get(room)) is not None and state.expected:
            self.fail(state, error)

    # From the pump of a session

    def begin(self, state: PrefillRoom) -> bool:
        """Whether the job may start; True must be followed by `done`."""
        if state.failure is not None:
            return False
        state.busy += 1
        return True

    def done(self, state: PrefillRoom) -> None:
        state.busy -= 1
        self._try_end(state)

    def fail(self, state: PrefillRoom, error: ErrorInfo) -> None:
        """Stop the room from our side; its end follows as soon as nobody touches its pages."""
        if state.failure is not None:
            return
        state.failure = error
        if state.peer is not None:
            # Bounded: a peer that is alive but does not answer loses its session, and with it all claim on our pages.
            limit_s = self._config.heartbeat_interval_s * self._config.heartbeat_max_failure
            self._set_timer(state, limit_s, "the decode side did not answer a cancel")
            state.awaits_cancelled = True
            state.peer.cancel(state.transfer_id, error.message)
        self._try_end(state)

    # From the peer

    def notice(self, peer: PrefillPeer, transfer_id: int, room: int, first_page_idx: int, num_pages: int) -> None:
        self._forget_expired()
        if (peer, transfer_id) in self._by_transfer:
            raise TransferError(f"transfer id {transfer_id} is in use")
        state = self._rooms.get(room)
        if state is not None and state.peer is not None:
            peer.cancel(transfer_id, f"bootstrap_room {room} is in use by another request")
            return
        if state is None:
            ended = self._ended.pop(room, None)
            if ended is not None and not ended.by_peer:
                peer.cancel(transfer_id, ended.error.message)
                return
            if sum(not known.expected for known in self._rooms.values()) >= self._config.max_pending_rooms:
                peer.cancel(transfer_id, "too many rooms wait for their requests")
                return
            state = self._add(room, expected=False, timeout_s=self._config.bootstrap_timeout_s)
        state.peer, state.transfer_id = peer, transfer_id
        state.first_page_idx, state.num_pages = first_page_idx, num_pages
        state.noticed_s = self._timers.now()
        self._by_transfer[peer, transfer_id] = state
        if state.expected:
            self._bootstrapped(state)

    def ack(self, peer: PrefillPeer, transfer_id: int) -> None:
        state = self._by_transfer.get((peer, transfer_id))
        if state is None:
            return
        if not state.last_queued:
            raise TransferError("acknowledged before the last page was sent")
        state.acked = True
        self._try_end(state)

    def cancel(self, peer: PrefillPeer, transfer_id: int, reason: str) -> None:
        """The decode side gave up and touches no page any more."""
        state = self._by_transfer.get((peer, transfer_id))
        if state is not None:
            self._gone(state, peer_aborted("decode", reason))

    def cancelled(self, peer: PrefillPeer, transfer_id: int) -> None:
        state = self._by_transfer.get((peer, transfer_id))
        if state is not None:
            if state.failure is None:
                raise TransferError("answer to a cancel that was not sent")
            state.awaits_cancelled = False
            self._try_end(state)

    def lost(self, peer: PrefillPeer, reason: str) -> None:
        """The session is over: whatever the decode side does now, it can no longer take a page of ours for good."""
        for state in [state for (owner, _), state in self._by_transfer.items() if owner is peer]:
            self._gone(state, broken(f"Losing connection with decode instance: {reason}"))

    def close(self, reason: str) -> None:
        """Fail every room that has not ended."""
        for state in list(self._rooms.values()):
            self.fail(state, aborted(reason))

    # Inside

    def _add(self, room: int, *, expected: bool, timeout_s: float) -> PrefillRoom:
        state = PrefillRoom(room, expected, self._timers.now())
        self._rooms[room] = state
        what = "no decode side asked for it" if expected else "no request with this room came"
        self._set_timer(state, timeout_s, what)
        return state

    def _bootstrapped(self, state: PrefillRoom) -> None:
        self._cancel_timer(state)
        self._emit(Bootstrapped(state.room, state.first_page_idx))

    def _gone(self, state: PrefillRoom, error: ErrorInfo) -> None:
        state.awaits_cancelled = False
        if state.failure is None:
            state.failure = error
        self._try_end(state)

    def _set_timer(self, state: PrefillRoom, delay_s: float, what: str) -> None:
        self._cancel_timer(state)
        state.timer = self._timers.call_later(delay_s, lambda: self._timeout(state, f"{what} within {delay_s:g} s"))

    def _cancel_timer(self, state: PrefillRoom) -> None:
        if state.timer is not None:
            state.timer.cancel()
            state.timer = None

    def _timeout(self, state: PrefillRoom, what: str) -> None:
        state.timer = None
        if self._rooms.get(state.room) is not state:
            return
        if state.failure is None:
            self.fail(state, timed_out(f"Prefill transfer of bootstrap_room {state.room} timed out: {what}"))
        elif state.awaits_cancelled and state.peer is not None:
            state.peer.drop(what)

    def _try_end(self, state: PrefillRoom) -> None:
        if state.busy or self._rooms.get(state.room) is not state:
            return
        if state.acked:
            now = self._timers.now()
            duration_s = now - state.send_started_s
            self.stats = self.stats.succeeded(state.num_bytes, duration_s, max(0.0, state.noticed_s - state.created_s))
            self._end(state, Sent(state.room, state.num_bytes, duration_s))
        elif state.failure is not None and not state.awaits_cancelled:
            if state.peer is None or not state.expected:
                self._remember(state, state.failure)
            if state.expected:
                self.stats = self.stats.failed()
            self._end(state, Failed(state.room, state.failure))

    def _end(self, state: PrefillRoom, event: Event) -> None:
        self._cancel_timer(state)
        del self._rooms[state.room]
        if state.peer is not None:
            del self._by_transfer[state.peer, state.transfer_id]
        if state.expected:
            self._emit(event)

    def _remember(self, state: PrefillRoom, error: ErrorInfo) -> None:
        self._forget_expired()
        self._ended.pop(state.room, None)
        expires_s = self._timers.now() + self._config.bootstrap_timeout_s
        self._ended[state.room] = _Ended(error, by_peer=not state.expected, expires_s=expires_s)
        if len(self._ended) > self._config.max_pending_rooms:
            self._ended.popitem(last=False)

    def _forget_expired(self) -> None:
        now = self._timers.now()
        while self._ended and next(iter(self._ended.values())).expires_s <= now:
            self._ended.popitem(last=False)


def _misfit(state: PrefillRoom, first_page_idx: int, num_pages: int, is_last: bool) -> str | None:
    """Why these pages are not the next ones the decode side waits for."""
    expected_idx = state.first_page_idx + state.num_sent
    if num_pages and first_page_idx != expected_idx:
        return f"pages must be sent in order: page {expected_idx} is next, got page {first_page_idx}"
    total = state.num_sent + num_pages
    if total > state.num_pages or (is_last and total < state.num_pages):
        return f"prefill has {total} pages to send, the decode side waits for {state.num_pages}"
    return None
