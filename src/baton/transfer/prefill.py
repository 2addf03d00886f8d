"""The sending side's front door: `open_prefill_transfer` gives the rank's loop its `PrefillTransfer`.

Owns the thread, the listener for decode ranks and, on rank 0, the registration of all ranks with the bootstrap server. Neighbours:
`prefill_session` (one decode rank), `prefill_rooms` (what happens to a room).
"""

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from urllib.parse import urlsplit

import msgspec

from baton.protocol.errors import ErrorInfo
from baton.transfer.base import Bootstrapped, Event, FirstToken, PageLayout, PrefillTransfer, Wake
from baton.transfer.bootstrap import Registration, register
from baton.transfer.config import TransferConfig, TransferConfigError
from baton.transfer.errors import TransferError, aborted, broken, room_in_use
from baton.transfer.fake import FakePrefillTransfer
from baton.transfer.listener import Listener
from baton.transfer.pages import Pages
from baton.transfer.prefill_rooms import PrefillRooms
from baton.transfer.prefill_session import PrefillContext, PrefillSession
from baton.transfer.ranks import check_page_bytes
from baton.transfer.shm import ShmServer
from baton.transfer.slices import Slice, whole_slice
from baton.transfer.stats import TransferStats
from baton.transfer.thread import TransferThread
from baton.transfer.timers import LoopTimers, MakeTimers
from baton.transfer.wire import Wire

log = logging.getLogger(__name__)

_MAX_SESSIONS = 4096
_REGISTER_RETRY_S = 0.2
_REGISTER_TIMEOUT_S = 5.0


def open_prefill_transfer(
    memory: Pages,
    layout: PageLayout,
    config: TransferConfig,
    *,
    host: str,
    bootstrap_url: str,
    wake: Wake,
    make_timers: MakeTimers = LoopTimers,
) -> "PrefillTransfer":
    """The only rank of a worker, or the only one with a pool: listen for decode ranks on `host` and register with the bootstrap server at
    `bootstrap_url` (http://host:port), again and again until it answers. With `config.backend == "fake"` nothing is opened.

    Raises `TransferConfigError` for a bad URL or layout and OSError when the host cannot be bound."""
    own = whole_slice(layout)
    check_page_bytes(memory, layout, own)
    if config.backend == "fake":
        return FakePrefillTransfer(wake)
    bootstrap = split_url(bootstrap_url)
    transfer = RankPrefillTransfer(
        memory, layout, config, host, own, wake, facing=bootstrap[0], make_timers=make_timers
    )
    transfer.register(bootstrap, [registration(0, 1, 1, transfer.address, own)])
    return transfer


class RankPrefillTransfer:
    """Implements `base.PrefillTransfer` over sessions with decode ranks."""

    def __init__(
        self,
        memory: Pages,
        layout: PageLayout,
        config: TransferConfig,
        host: str,
        own: Slice,
        wake: Wake,
        *,
        facing: str,
        leads: bool = True,
        make_timers: MakeTimers = LoopTimers,
    ) -> None:
        """`own`: what `memory` holds of a page, `facing`: see `_advertised`; `leads`: this is rank 0. Raises OSError when the host cannot
        be bound."""
        self._config = config
        self._num_pages = memory.num_pages
        self._open: set[int] = set()  # Rooms whose end event the rank has not polled yet. Rank's loop only.
        self._sessions: set[PrefillSession] = set()
        self._session_numbers = itertools.count(1)
        self._registered = threading.Event()
        self._listener = _listen(host)
        self.address: tuple[str, int] = (_advertised(host, facing), self._listener.getsockname()[1])
        """To be registered: where decode ranks reach us."""
        self._thread = TransferThread("baton-prefill-transfer", config.copy_threads, wake)
        timers = make_timers(self._thread.loop)
        self._rooms = PrefillRooms(config, timers, self._thread.emit)
        shm = _offer_shared_memory(memory) if config.backend == "auto" else None
        self._context = PrefillContext(self._thread, self._rooms, memory, layout, own, leads, config, timers, shm)
        self._thread.ask(self._start)

    # base.PrefillTransfer

    def expect(self, room: int, timeout_s: float) -> None:
        """Raises `RequestError` (400) when the room is in use."""
        if room in self._open:
            raise room_in_use(room)
        self._open.add(room)
        self._post(room, partial(self._rooms.expect, room, timeout_s))

    def send(self, room: int, first_page_idx: int, page_ids: Sequence[int], first_token: FirstToken | None) -> None:
        """Raises ValueError for a page that is not in the pool."""
        if any(not 0 <= page_id < self._num_pages for page_id in page_ids):
            raise ValueError(f"page ids of room {room} must be in [0, {self._num_pages}): {list(page_ids)}")
        self._post(room, partial(self._rooms.send, room, first_page_idx, tuple(page_ids), first_token))

    def abort(self, room: int, reason: str) -> None:
        self._post(room, partial(self._rooms.stop, room, aborted(reason)))

    def poll(self) -> list[Event]:
        events = self._thread.take_events()
        self._open.difference_update(event.room for event in events if not isinstance(event, Bootstrapped))
        return events

    def close(self) -> None:
        """End every room and session; the end events can be polled afterwards."""
        self._thread.close(self._stop)

    # Beyond the contract

    def register(self, bootstrap: tuple[str, int], entries: Sequence[Registration]) -> None:
        """Make the ranks of this engine known to its worker's bootstrap server, and go on doing so. Rank 0 calls it, once, for all."""
        size, rank = self._config.dp_size, self._config.dp_rank
        entries = [msgspec.structs.replace(one, system_dp_size=size, system_dp_rank=rank) for one in entries]
        self._thread.ask(lambda: self._thread.start(self._keep_registered(bootstrap, entries), "register"))

    def wait_registered(self, timeout_s: float) -> bool:
        """Whether the bootstrap server knows the worker; waits up to `timeout_s` for it."""
        return self._registered.wait(timeout_s)

    def stats(self) -> TransferStats:
        return self._rooms.stats

    def num_rooms(self) -> tuple[int, int]:
        """Open rooms, and ended rooms still remembered (for self-checks; waits for the transfer's thread)."""
        return self._thread.ask(lambda: (self._rooms.num_open, self._rooms.num_remembered))

    # On the thread

    def _post(self, room: int, call: Callable[[], None]) -> None:
        def run() -> None:
            try:
                call()
            except Exception as error:  # A bug of ours: costs this room, reported as its end.
                log.exception("transfer call failed", extra={"room": room})
                self._rooms.stop(room, _internal(error))

        self._thread.post(run)

    def _start(self) -> None:
        self._listening = Listener(self._thread.loop, self._listener, self._connected)
        if self._context.shm is not None:
            self._context.shm.start(self._thread.loop)

    def _stop(self) -> None:
        self._listening.close()
        if self._context.shm is not None:
            self._context.shm.close()
        self._rooms.close("the prefill worker is shutting down")
        for session in list(self._sessions):
            session.drop("the prefill worker is shutting down")

    def _connected(self, connection: socket.socket) -> None:
        if len(self._sessions) >= _MAX_SESSIONS:
            log.warning("too many decode sessions")
            connection.close()
            return
        session = PrefillSession(self._context, f"session {next(self._session_numbers)}", self._sessions.discard)
        self._sessions.add(session)
        session.attach(Wire(self._thread.loop, connection, session.on_frame, session.on_lost))

    async def _keep_registered(self, bootstrap: tuple[str, int], entries: Sequence[Registration]) -> None:
        """A bootstrap server that was restarted must learn about us again."""
        failing = False
        while True:
            try:
                async with asyncio.timeout(_REGISTER_TIMEOUT_S):
                    for entry in entries:
                        await register(*bootstrap, entry)
                self._registered.set()
                failing = False
            except (OSError, TransferError) as error:  # TimeoutError is an OSError.
                if not failing:
                    log.warning("cannot register", extra={"bootstrap": bootstrap, "reason": str(error)})
                failing = True
            await asyncio.sleep(_REGISTER_RETRY_S if failing else self._config.registration_interval_s)


def _internal(error: Exception) -> ErrorInfo:
    return broken(f"internal error: {error!r}")


def _offer_shared_memory(memory: Pages) -> ShmServer | None:
    try:
        return ShmServer(memory)
    except OSError as error:
        log.warning("no shared memory offer, TCP only", extra={"reason": str(error)})
        return None


def registration(rank: int, tp_size: int, pp_size: int, address: tuple[str, int], held: Slice) -> Registration:
    """Of a rank of an engine that holds `held`; ranks are numbered stage after stage."""
    stage, tp_rank = divmod(rank, tp_size)
    return Registration("Prefill", tp_size, tp_rank, 1, 0, pp_size, stage, 1, 0, *address, held)


def split_url(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):
        if parts.scheme == "http" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    raise TransferConfigError(f"bootstrap_url must be http://host:port, got {url!r}")


def _listen(host: str) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]") or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _advertised(host: str, facing: str) -> str:
    """The address to register. Listening on every address, we name the one that faces the bootstrap server at `facing`; when that is
    on this host, "every address", which decode ranks read as "where the bootstrap server is"."""
    if host and not _is_unspecified(host):
        return host
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(facing, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # Sends nothing: it only asks the routing table.
            local = str(probe.getsockname()[0])
        if not ipaddress.ip_address(local).is_loopback:
            return local
    return "0.0.0.0"


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False  # A name.
