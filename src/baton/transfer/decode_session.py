"""One session of a decode rank with a prefill rank: hello, heart-beat, and the arrival of pages.

How the rank is found: `decode_route`. What a frame does to a room is decided in `decode_rooms`; bytes and sockets are `wire`'s.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from baton.protocol.errors import ErrorInfo
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
from baton.transfer.slices import Slice, part_of_pages, slice_bytes
from baton.transfer.thread import TransferThread
from baton.transfer.timers import Timers
from baton.transfer.wire import Wire

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeContext:
    """What all sessions of one decode rank share."""

    thread: TransferThread
    rooms: DecodeRooms
    pages: Pages
    hello: Hello
    """Without what differs from session to session."""
    slices: Sequence[Slice]
    """What the ranks of this worker hold of a page."""
    config: TransferConfig
    timers: Timers

    @property
    def own(self) -> Slice:
        """What `pages` hold."""
        return self.slices[self.hello.rank]


class DecodeSession:
    """Implements `decode_rooms.DecodePeer`. `on_lost(reason)` is called once, for any end but `close`."""

    def __init__(
        self,
        context: DecodeContext,
        name: str,
        source: Slice,
        part: Slice,
        num_takers: int,
        on_lost: Callable[[str], None],
    ) -> None:
        """`source`: what the prefill rank holds of a page; `part`: what of it comes here; `num_takers`: of this worker."""
        self.name = name
        self.moves_pages = not part.is_empty
        self.mode: str | None = None
        """shm or tcp; None: not connected yet."""
        self._context = context
        self._thread, self._rooms, self._config = context.thread, context.rooms, context.config
        self._hello = msgspec.structs.replace(context.hello, part=part, num_takers=num_takers)
        self._source, self._part = source, part
        self._pages = (
            part_of_pages(context.pages.array, context.hello.layout, context.own, part) if self.moves_pages else None
        )
        self._part_bytes = slice_bytes(context.hello.layout, part)
        self._on_lost = on_lost
        self._closed = False
        self._wire: Wire | None = None
        self._hello_reply: asyncio.Future[Welcome | Refuse] = context.thread.loop.create_future()
        self._remote: NDArray[np.uint8] | None = None
        """[num_pages, l, 2, k, H]: the part of the prefill's pages, shared memory."""
        self._incoming: DecodeRoom | None = None  # Whose page the wire is writing.
        self._scratch = memoryview(b"")
        self._heartbeat: Heartbeat | None = None

    # DecodePeer

    def notify(self, state: DecodeRoom) -> None:
        self._send(Notice(state.transfer_id, state.room, state.first_page_idx, len(state.page_ids)))

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

    def close(self) -> None:
        """End the session without a word to anyone. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        if self._wire is not None:
            self._wire.close()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._hello_reply.cancel()
        self._remote = None

    async def connect(self, address: tuple[str, int]) -> None:
        """Ready for rooms when it returns, or closed meanwhile. Raises OSError or `TransferError`; `on_lost` may come first."""
        sock = await _dial(address)
        if self._closed:
            sock.close()
            return
        await self._greet(sock)

    def _lost(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._on_lost(reason)

    async def _greet(self, sock: socket.socket) -> None:
        self._wire = Wire(self._thread.loop, sock, self._on_frame, self._lost)
        self._send(self._hello)
        reply = await self._hello_reply
        if isinstance(reply, Refuse):
            raise TransferError(reply.message)
        remote = await self._map(reply)
        if self._closed:
            return
        self._remote = remote
        self.mode = "tcp" if remote is None else "shm"
        self._wire.max_frame_bytes = self._config.max_frame_bytes
        self._send(Mode("tcp" if remote is None else "shm"))
        self._heartbeat = Heartbeat(
            self._context.timers,
            self._config.heartbeat_interval_s,
            self._config.heartbeat_max_failure,
            ping=lambda: self._send(Ping()),
            dead=self._lost,
        )
        log.info("prefill session started", extra={"prefill": self.name, "mode": self.mode})

    async def _map(self, welcome: Welcome) -> NDArray[np.uint8] | None:
        """The prefill's pages, if they are offered and lie on this host."""
        if welcome.shm is None or self._config.backend == "tcp" or not self.moves_pages:
            return None
        layout = self._hello.layout
        work = partial(RemotePages.map, welcome.shm, slice_bytes(layout, self._source))
        try:
            remote = await self._thread.loop.run_in_executor(None, work)
            return part_of_pages(remote.array, layout, self._source, self._part)
        except (OSError, TransferError) as error:
            log.info("no shared memory, using TCP", extra={"prefill": self.name, "reason": str(error)})
            return None

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
        if self._remote is None or self._pages is None or len(chunk.page_ids) != len(chunk.checksums):
            raise TransferError("bad chunk of pages")
        if any(not 0 <= page_id < len(self._remote) for page_id in chunk.page_ids):
            raise TransferError("chunk names a page outside the prefill's pool")
        num_pages = len(chunk.page_ids)
        state = self._rooms.claim(self, chunk.transfer_id, chunk.first_page_idx, num_pages)
        if state is None:
            return
        first = chunk.first_page_idx - state.first_page_idx
        work = partial(
            copy_pages,
            self._remote,
            chunk.page_ids,
            self._pages,
            state.page_ids[first : first + num_pages],
            chunk.checksums,
            lambda: state.failure is not None,
        )
        self._run(state, num_pages, work)

    def _page(self, page: Page) -> None:
        """A page follows on the wire: straight into our pool if its room still wants it and it lies there in one piece, then
        verify."""
        if self.mode != "tcp" or self._pages is None:
            raise TransferError("page body in a session that carries none")
        state = self._rooms.claim(self, page.transfer_id, page.page_idx, 1)
        assert self._wire is not None
        if state is None:
            self._wire.read_into(self._scratch_page(), _nothing)
            return
        target = self._pages[state.page_ids[page.page_idx - state.first_page_idx]]
        sink = target.reshape(-1).data if target.flags.c_contiguous else self._scratch_page()
        self._incoming = state
        self._wire.read_into(sink, lambda: self._page_arrived(state, target, page))

    def _page_arrived(self, state: DecodeRoom, target: NDArray[np.uint8], page: Page) -> None:
        """Verified here, not on the copy thread: summing takes tens of microseconds, less than handing it over costs, and
        the page is still in this core's cache."""
        self._incoming = None
        self._rooms.begin(state)
        if not target.flags.c_contiguous:
            target[...] = np.frombuffer(self._scratch, dtype=np.uint8).reshape(target.shape)
        if checksum(target) == page.checksum:
            self._rooms.done(state, self, 1, None)
        else:
            self._rooms.done(state, self, 0, _damaged(state))

    def _run(self, state: DecodeRoom, num_pages: int, work: Callable[[], bool]) -> None:
        self._rooms.begin(state)
        self._thread.copy(work).add_done_callback(lambda future: self._ran(state, num_pages, future))

    def _ran(self, state: DecodeRoom, num_pages: int, future: "asyncio.Future[bool]") -> None:
        if (problem := future.exception()) is not None:
            log.error("copying pages failed", exc_info=problem, extra={"room": state.room})
            self._rooms.done(state, self, 0, broken(f"internal error: {problem!r}"))
        elif not future.result():
            self._rooms.done(state, self, 0, _damaged(state))
        else:
            self._rooms.done(state, self, num_pages, None)

    def _scratch_page(self) -> memoryview:
        """Where pages go that nobody wants any more, or that are put in their places when they are complete."""
        if not self._scratch:
            self._scratch = memoryview(bytearray(self._part_bytes))
        return self._scratch


def _damaged(state: DecodeRoom) -> ErrorInfo:
    return broken(f"A page of bootstrap_room {state.room} arrived damaged (checksum mismatch)")


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
