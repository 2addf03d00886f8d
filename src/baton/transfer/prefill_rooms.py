"""The sending side's rooms: a state machine without sockets, threads or clocks of its own.

Who does what: the rank's calls (`expect`, `send`, `abort`) and the peer's frames (`notice`, `ack`, ...) come in here; what
must be sent goes out through `PrefillPeer`, what the rank must hear through `emit`. Neighbours: `prefill_session` is the
real peer, `prefill` the thread around both.

A room, from `expect` (or an early notice) to its one end event. Its takers are the ranks of one decode worker that take something of our
pages: all give notice and all acknowledge, each in its own session, and one that fails fails the room for the others.

    expected ──notices──► bootstrapped ──send…──► last queued ──acks──► Sent
        │                     │                      │
        └──── failure (abort, time-out, peer's cancel, lost session) ──► stopping ──► Failed

A stopping room ends when `busy == 0` (our own thread reads no page of it) and no answer to a Cancel of ours is outstanding (the
decode side, which reads our pages in shared memory, reads none either; a lost session counts as that answer, see
`decode_session`). Invariant: a room is in `_rooms` exactly until its end.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from baton.protocol.errors import ErrorInfo
from baton.transfer.base import Bootstrapped, Event, Failed, FirstToken, Sent
from baton.transfer.config import TransferConfig
from baton.transfer.errors import TransferError, aborted, broken, peer_aborted, timed_out
from baton.transfer.stats import TransferStats
from baton.transfer.timers import Timer, Timers


class PrefillPeer(Protocol):
    """One session with a decode rank."""

    worker: str
    """Its worker: the same for all sessions with ranks of it."""
    num_takers: int
    """Ranks of its worker that give notice of a room here."""

    def enqueue(self, job: "SendJob") -> None: ...

    def cancel(self, transfer_id: int, reason: str) -> None: ...

    def drop(self, reason: str) -> None:
        """Close the session; `PrefillRooms.lost` follows."""


@dataclass(slots=True, eq=False)
class Taker:
    """A decode rank in a room."""

    peer: PrefillPeer
    acked: bool = False
    awaits_cancelled: bool = False


@dataclass(slots=True, eq=False)
class PrefillRoom:
    room: int
    expected: bool
    """The rank knows this room and is owed an end event; False: only the decode side's notice is here."""
    created_s: float
    takers: dict[PrefillPeer, Taker] = field(default_factory=dict)
    """Those that gave notice."""
    worker: str = ""
    """Theirs; with the transfer id it names the attempt."""
    num_takers: int = 1
    """How many there will be; known from the first notice."""
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
    failure: ErrorInfo | None = None
    timer: Timer | None = None

    @property
    def has_all_takers(self) -> bool:
        return len(self.takers) == self.num_takers

    @property
    def has_all_acks(self) -> bool:
        return self.has_all_takers and all(taker.acked for taker in self.takers.values())

    @property
    def awaits_cancelled(self) -> bool:
        return any(taker.awaits_cancelled for taker in self.takers.values())


@dataclass(frozen=True, slots=True, eq=False)
class SendJob:
    """One `send` call, for the pump of each taker's session. The pump brackets its work with `begin` and `done`."""

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
    attempt: tuple[str, int] | None
    """The decode worker's, which some of its takers have not heard of yet; None: nobody came."""
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
                self._try_bootstrap(known)
        elif ended is not None and ended.by_peer and ended.expires_s > self._timers.now():
            self.stats = self.stats.failed()
            self._emit(Failed(room, ended.error))
        else:
            self._add(room, expected=True, timeout_s=timeout_s)

    def send(self, room: int, first_page_idx: int, page_ids: Sequence[int], first_token: FirstToken | None) -> None:
        state = self._rooms.get(room)
        if state is None or state.failure is not None:
            return  # It ended meanwhile; the rank finds the event in its next poll.
        if not state.has_all_takers or state.last_queued:
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
        job = SendJob(state, first_page_idx, page_ids, first_token)
        for taker in state.takers.values():
            taker.peer.enqueue(job)

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
        if state.failure is None:
            self._stop(state, error)
            self._try_end(state)

    # From the peer

    def notice(self, peer: PrefillPeer, transfer_id: int, room: int, first_page_idx: int, num_pages: int) -> None:
        self._forget_expired()
        if (peer, transfer_id) in self._by_transfer:
            raise TransferError(f"transfer id {transfer_id} is in use")
        state = self._rooms.get(room)
        if state is None:
            if (error := self._ended_early(room, peer, transfer_id)) is not None:
                peer.cancel(transfer_id, error.message)
                return
            if sum(not known.expected for known in self._rooms.values()) >= self._config.max_pending_rooms:
                peer.cancel(transfer_id, "too many rooms wait for their requests")
                return
            state = self._add(room, expected=False, timeout_s=self._config.bootstrap_timeout_s)
        if not state.takers:
            state.worker, state.num_takers, state.transfer_id = peer.worker, peer.num_takers, transfer_id
            state.first_page_idx, state.num_pages = first_page_idx, num_pages
        elif problem := _stranger(state, peer, transfer_id, first_page_idx, num_pages):
            peer.cancel(transfer_id, problem)
            return
        state.takers[peer] = Taker(peer)
        self._by_transfer[peer, transfer_id] = state
        state.noticed_s = self._timers.now()
        if state.expected:
            self._try_bootstrap(state)

    def ack(self, peer: PrefillPeer, transfer_id: int) -> None:
        state = self._by_transfer.get((peer, transfer_id))
        if state is None:
            return
        if not state.last_queued:
            raise TransferError("acknowledged before the last page was sent")
        state.takers[peer].acked = True
        state.takers[peer].awaits_cancelled = False
        self._try_end(state)

    def cancel(self, peer: PrefillPeer, transfer_id: int, reason: str) -> None:
        """The decode side gave up and touches no page any more."""
        state = self._by_transfer.get((peer, transfer_id))
        if state is not None:
            self._gone(state, peer, peer_aborted("decode", reason))

    def cancelled(self, peer: PrefillPeer, transfer_id: int) -> None:
        state = self._by_transfer.get((peer, transfer_id))
        if state is not None:
            if state.failure is None:
                raise TransferError("answer to a cancel that was not sent")
            state.takers[peer].awaits_cancelled = False
            self._try_end(state)

    def lost(self, peer: PrefillPeer, reason: str) -> None:
        """The session is over: whatever the decode side does now, it can no longer take a page of ours for good."""
        for state in [state for (owner, _), state in self._by_transfer.items() if owner is peer]:
            self._gone(state, peer, broken(f"Losing connection with decode instance: {reason}"))

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

    def _try_bootstrap(self, state: PrefillRoom) -> None:
        if state.has_all_takers:
            self._cancel_timer(state)
            self._emit(Bootstrapped(state.room, state.first_page_idx))

    def _ended_early(self, room: int, peer: PrefillPeer, transfer_id: int) -> ErrorInfo | None:
        """Why the room of this notice has ended already."""
        ended, attempt = self._ended.get(room), (peer.worker, transfer_id)
        if ended is None:
            return None
        if ended.attempt is None and peer.num_takers > 1:
            self._ended[room] = replace(ended, attempt=attempt)
        elif ended.attempt != attempt:
            del self._ended[room]
        return ended.error if ended.attempt in (None, attempt) else None

    def _gone(self, state: PrefillRoom, peer: PrefillPeer, error: ErrorInfo) -> None:
        """A taker touches no page any more, and the others must stop."""
        taker = state.takers[peer]
        if taker.acked:
            return
        taker.awaits_cancelled = False
        if state.failure is None:
            self._stop(state, error, gone=peer)
        self._try_end(state)

    def _stop(self, state: PrefillRoom, error: ErrorInfo, gone: PrefillPeer | None = None) -> None:
        """Nothing more is handed over, and all takers but `gone` are asked to stop."""
        state.failure = error
        asked = [taker for taker in state.takers.values() if not taker.acked and taker.peer is not gone]
        for taker in asked:
            taker.awaits_cancelled = True
        if asked:
            # Bounded: a peer that is alive but does not answer loses its session, and with it all claim on our pages.
            limit_s = self._config.heartbeat_interval_s * self._config.heartbeat_max_failure
            self._set_timer(state, limit_s, "the decode side did not answer a cancel")
        for taker in asked:
            taker.peer.cancel(state.transfer_id, error.message)

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
        else:
            for taker in [taker for taker in state.takers.values() if taker.awaits_cancelled]:
                taker.peer.drop(what)

    def _try_end(self, state: PrefillRoom) -> None:
        if state.busy or self._rooms.get(state.room) is not state:
            return
        if state.has_all_acks:
            now = self._timers.now()
            duration_s = now - state.send_started_s
            self.stats = self.stats.succeeded(state.num_bytes, duration_s, max(0.0, state.noticed_s - state.created_s))
            self._end(state, Sent(state.room, state.num_bytes, duration_s))
        elif state.failure is not None and not state.awaits_cancelled:
            if not state.has_all_takers or not state.expected:
                self._remember(state, state.failure)
            if state.expected:
                self.stats = self.stats.failed()
            self._end(state, Failed(state.room, state.failure))

    def _end(self, state: PrefillRoom, event: Event) -> None:
        self._cancel_timer(state)
        del self._rooms[state.room]
        for peer in state.takers:
            del self._by_transfer[peer, state.transfer_id]
        if state.expected:
            self._emit(event)

    def _remember(self, state: PrefillRoom, error: ErrorInfo) -> None:
        self._forget_expired()
        self._ended.pop(state.room, None)
        expires_s = self._timers.now() + self._config.bootstrap_timeout_s
        attempt = (state.worker, state.transfer_id) if state.takers else None
        self._ended[state.room] = _Ended(error, not state.expected, attempt, expires_s)
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


def _stranger(
    state: PrefillRoom, peer: PrefillPeer, transfer_id: int, first_page_idx: int, num_pages: int
) -> str | None:
    """Why this notice is not from one more taker of the room."""
    if (state.worker, state.transfer_id) == (peer.worker, transfer_id):
        if state.failure is not None:
            return state.failure.message
        if not state.has_all_takers and (state.first_page_idx, state.num_pages) == (first_page_idx, num_pages):
            return None
    return f"bootstrap_room {state.room} is in use by another request"
