"""One session of a decode rank with a prefill rank: finding it, hello, heart-beat, and the arrival of pages.

What a frame does to a room is decided in `decode_rooms`; bytes and sockets are `wire`'s.

Why a lost connection is final for both sides, also with shared memory: all writing into our pool is done by our own
threads (`decode_rooms`), so nothing of the peer can come late. The other way round, we may still be reading a page of the
prefill's pool when the prefill sees our connection end, and it may reuse that page at once: what we read then does not
match the page's checksum, or arrives in a room that has already failed; it is never used. If we were killed, the kernel
tears down a process's memory before it closes its files, so a prefill that sees the end of our connection can be sure
that our mapping of its pool is gone as well.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from baton.protocol.errors import ErrorInfo
from baton.transfer.bootstrap import RankAddress, look_up
from baton.transfer.config import TransferConfig
from baton.transfer.decode_rooms import DecodeRoom, DecodeRooms
from baton.transfer.errors import TransferError, broken
from baton.transfer.frames import (
    Ack,
    Cancel,
    Cancelled,
    Chunk,
    Frame,
    Hello,
    Last,
    Mode,
    Notice,
    Page,
    Ping,
    Pong,
    Refuse,
    Welcome,
)  # fmt: skip
from baton.transfer.heartbeat import Heartbeat
from baton.transfer.pages import Pages, checksum, copy_pages
from baton.transfer.shm import RemotePages
from baton.transfer.thread import TransferThread
from baton.transfer.timers import Timers
from baton.transfer.wire import Wire

log = logging.getLogger(__name__)

_UNSPECIFIED = ("0.0.0.0", "::", "")


@dataclass(frozen=True, slots=True)
class DecodeContext:
    """What all sessions of one decode rank share."""

    thread: TransferThread
    rooms: DecodeRooms
    pages: Pages
    hello: Hello
    config: TransferConfig
    timers: Timers


class DecodeSession:
    """Implements `decode_rooms.DecodePeer`. `on_closed(self)` is called once; a new session may take its place then."""

    def __init__(
        self, context: DecodeContext, address: tuple[str, int], on_closed: "Callable[[DecodeSession], None]"
    ) -> None:
        self.address = address
        self.name = f"{address[0]}:{address[1]}"
        self.mode: str | None = None
        """How pages travel; None until connected."""
        self._context = context
        self._thread, self._rooms, self._pages = context.thread, context.rooms, context.pages
        self._config = context.config
        self._on_closed = on_closed
        self._closed = False
        self._waiting: list[DecodeRoom] = []
        self._wire: Wire | None = None
        self._hello_reply: asyncio.Future[Welcome | Refuse] = context.thread.loop.create_future()
        self._remote: RemotePages | None = None
        self._incoming: DecodeRoom | None = None  # Whose page the wire is writing.
        self._scratch = memoryview(b"")
        self._heartbeat: Heartbeat | None = None
        context.thread.start(self._connect(), f"connect {self.name}")

    # DecodePeer

    def open(self, state: DecodeRoom) -> None:
        if self.mode is None:
            self._waiting.append(state)
        else:
            self._notify(state)

    def release(self, state: DecodeRoom) -> None:
        if self._incoming is state and self._wire is not None:
            self._incoming = None
            self._wire.divert(self._scratch_page())

    def ack(self, transfer_id: int) -> None:
        self._send(Ack(transfer_id))

    def cancel(self, transfer_id: int, reason: str) -> None:
        self._send(Cancel(transfer_id, reason))

    def cancelled(self, transfer_id: int) -> None:
        self._send(Cancelled(transfer_id))

    # Life

    def drop(self, reason: str) -> None:
        """End the session; every room of it fails. Does nothing the second time."""
        if self._closed:
            return
        log.warning("prefill session lost", extra={"bootstrap_addr": self.name, "reason": reason})
        self.close(reason)

    def close(self, reason: str) -> None:
        """As `drop`, on purpose."""
        if self._closed:
            return
        self._closed = True
        if self._wire is not None:
            self._wire.close()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._hello_reply.cancel()
        self._remote = None
        self._on_closed(self)
        self._rooms.lost(self, f"Losing connection with prefill instance (bootstrap_addr: {self.name}): {reason}")

    async def _connect(self) -> None:
        limit_s = self._config.connect_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                rank = await look_up(*self.address, self._config.tp_rank, self._config.tp_size)
                sock = await _dial(_reachable(rank, self.address[0]))
                await self._greet(sock)
        except TimeoutError:
            self.drop(f"no connection within {limit_s:g} s")
        except (OSError, TransferError) as error:
            self.drop(str(error))
        except asyncio.CancelledError:
            if not self._closed:  # The whole transfer is closing; a lost wire has already dropped us otherwise.
                self.close("closed")
        except Exception as error:  # A bug of ours: costs this session's rooms, reported as their end.
            log.exception("connecting failed", extra={"bootstrap_addr": self.name})
            self.drop(f"internal error: {error!r}")

    async def _greet(self, sock: socket.socket) -> None:
        self._wire = Wire(self._thread.loop, sock, self._on_frame, self.drop)
        self._send(self._context.hello)
        reply = await self._hello_reply
        if isinstance(reply, Refuse):
            raise TransferError(reply.message)
        remote = await self._map(reply)
        if self._closed:
            return
        self._remote = remote
        self._wire.max_frame_bytes = self._config.max_frame_bytes
        self.mode = "tcp" if self._remote is None else "shm"
        self._send(Mode("tcp" if self._remote is None else "shm"))
        self._heartbeat = Heartbeat(
            self._context.timers,
            self._config.heartbeat_interval_s,
            self._config.heartbeat_max_failure,
            ping=lambda: self._send(Ping()),
            dead=self.drop,
        )
        log.info("prefill session started", extra={"bootstrap_addr": self.name, "mode": self.mode})
        waiting, self._waiting = self._waiting, []
        for state in waiting:
            self._notify(state)

    async def _map(self, welcome: Welcome) -> RemotePages | None:
        """The prefill's pool, if it is offered and lies on this host."""
        if welcome.shm is None or self._config.backend == "tcp":
            return None
        work = partial(RemotePages.map, welcome.shm, self._pages.page_bytes)
        try:
            return await self._thread.loop.run_in_executor(None, work)
        except (OSError, TransferError) as error:
            log.info("no shared memory, using TCP", extra={"bootstrap_addr": self.name, "reason": str(error)})
            return None

    def _notify(self, state: DecodeRoom) -> None:
        self._send(Notice(state.transfer_id, state.room, state.first_page_idx, len(state.page_ids)))
        if state.failure is None:
            self._rooms.noticed(state)
        else:
            # Given up while we were connecting: the prefill must not wait for a decode side that will never come.
            self._send(Cancel(state.transfer_id, state.failure.message))

    def _send(self, frame: Frame) -> None:
        if self._wire is not None:
            self._wire.send(frame)

    # Frames

    def _on_frame(self, frame: Frame) -> None:
        if self._heartbeat is not None:
            self._heartbeat.seen()
        if isinstance(frame, Welcome | Refuse):
            if self._hello_reply.done():
                raise TransferError("second hello reply")
            self._hello_reply.set_result(frame)
        elif self.mode is None:
            raise TransferError(f"{type(frame).__name__} in the middle of the hello")
        elif isinstance(frame, Chunk):
            self._chunk(frame)
        elif isinstance(frame, Page):
            self._page(frame)
        elif isinstance(frame, Last):
            self._rooms.last(self, frame.transfer_id, frame.num_pages, frame.first_token)
        elif isinstance(frame, Cancel):
            self._rooms.cancel(self, frame.transfer_id, frame.reason)
        elif isinstance(frame, Ping):
            self._send(Pong())
        elif not isinstance(frame, Pong):
            raise TransferError(f"unexpected {type(frame).__name__} from a prefill side")

    def _chunk(self, chunk: Chunk) -> None:
        """Pages lie ready in the prefill's pool: copy them out, and verify, on the copy thread."""
        if self._remote is None or len(chunk.page_ids) != len(chunk.checksums):
            raise TransferError("bad chunk of pages")
        if any(not 0 <= page_id < self._remote.num_pages for page_id in chunk.page_ids):
            raise TransferError("chunk names a page outside the prefill's pool")
        num_pages = len(chunk.page_ids)
        state = self._rooms.claim(self, chunk.transfer_id, chunk.first_page_idx, num_pages)
        if state is None:
            return
        first = chunk.first_page_idx - state.first_page_idx
        work = partial(
            copy_pages,
            self._remote.array,
            chunk.page_ids,
            self._pages.array,
            state.page_ids[first : first + num_pages],
            chunk.checksums,
            lambda: state.failure is not None,
        )
        self._run(state, num_pages, work)

    def _page(self, page: Page) -> None:
        """A page follows on the wire: straight into our pool if its room still wants it, then verify."""
        if self.mode != "tcp":
            raise TransferError("page body in a shared memory session")
        state = self._rooms.claim(self, page.transfer_id, page.page_idx, 1)
        assert self._wire is not None
        if state is None:
            self._wire.read_into(self._scratch_page(), _nothing)
            return
        target = self._pages.array[state.page_ids[page.page_idx - state.first_page_idx]]
        self._incoming = state
        self._wire.read_into(target.data, lambda: self._page_arrived(state, target, page))

    def _page_arrived(self, state: DecodeRoom, target: NDArray[np.uint8], page: Page) -> None:
        """Verified here, not on the copy thread: summing takes tens of microseconds, less than handing it over costs, and
        the page is still in this core's cache."""
        self._incoming = None
        self._rooms.begin(state)
        if checksum(target) == page.checksum:
            self._rooms.done(state, 1, None)
        else:
            self._rooms.done(state, 0, _damaged(state))

    def _run(self, state: DecodeRoom, num_pages: int, work: Callable[[], bool]) -> None:
        self._rooms.begin(state)
        self._thread.copy(work).add_done_callback(lambda future: self._ran(state, num_pages, future))

    def _ran(self, state: DecodeRoom, num_pages: int, future: "asyncio.Future[bool]") -> None:
        if (problem := future.exception()) is not None:
            log.error("copying pages failed", exc_info=problem, extra={"room": state.room})
            self._rooms.done(state, 0, broken(f"internal error: {problem!r}"))
        elif not future.result():
            self._rooms.done(state, 0, _damaged(state))
        else:
            self._rooms.done(state, num_pages, None)

    def _scratch_page(self) -> memoryview:
        """Where pages go that nobody wants any more."""
        if not self._scratch:
            self._scratch = memoryview(bytearray(self._pages.page_bytes))
        return self._scratch


def _damaged(state: DecodeRoom) -> ErrorInfo:
    return broken(f"A page of bootstrap_room {state.room} arrived damaged (checksum mismatch)")


def _reachable(rank: RankAddress, bootstrap_host: str) -> tuple[str, int]:
    """A rank that listens on every address registers that; it is then on the bootstrap server's own host."""
    return (bootstrap_host if rank.rank_ip in _UNSPECIFIED else rank.rank_ip), rank.rank_port


async def _dial(address: tuple[str, int]) -> socket.socket:
    loop = asyncio.get_running_loop()
    failure: OSError = OSError(f"no address for {address[0]}")
    host = address[0].strip("[]")
    for family, kind, protocol, _, target in await loop.getaddrinfo(host, address[1], type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, target)
            return sock
        except OSError as error:
            failure = error
            sock.close()
        except BaseException:
            sock.close()
            raise
    raise failure


def _nothing() -> None:
    pass
