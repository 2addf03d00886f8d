"""One session of a prefill rank with a decode rank: hello, heart-beat, and the pump that hands pages over.

What a frame does to a room is decided in `prefill_rooms`; bytes and sockets are `wire`'s; who may map our pool is `shm`'s.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from baton.transfer.base import PageLayout
from baton.transfer.config import TransferConfig
from baton.transfer.errors import TransferError, broken
from baton.transfer.frames import (
    PROTOCOL_VERSION,
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
    ShmOffer,
    Welcome,
    layout_mismatch,
)  # fmt: skip
from baton.transfer.heartbeat import Heartbeat
from baton.transfer.pages import Pages, Stopped, checksum_pages, sum_pages
from baton.transfer.prefill_rooms import PrefillRooms, SendJob
from baton.transfer.shm import ShmServer
from baton.transfer.slices import Slice, part_of_pages, slice_bytes
from baton.transfer.thread import TransferThread
from baton.transfer.timers import Timers
from baton.transfer.wire import Wire

log = logging.getLogger(__name__)
T = TypeVar("T")

_NUM_GROUPS_AHEAD = 2
"""Groups of pages being summed while the one before them is handed over."""


@dataclass(frozen=True, slots=True)
class PrefillContext:
    """What all sessions of one prefill rank share."""

    thread: TransferThread
    rooms: PrefillRooms
    pages: Pages
    layout: PageLayout
    own: Slice
    """What of a page `pages` hold."""
    leads: bool
    """This is rank 0 of its worker, whose first token counts."""
    config: TransferConfig
    timers: Timers
    shm: ShmServer | None
    """None: this side offers no shared memory."""


class PrefillSession:
    """Implements `prefill_rooms.PrefillPeer`. `on_closed(self)` is called once."""

    def __init__(self, context: PrefillContext, name: str, on_closed: "Callable[[PrefillSession], None]") -> None:
        self.name = name
        self.worker, self.num_takers = "", 1  # These and the part: until the hello.
        self._sends_token = False
        self._part = part_of_pages(context.pages.array, context.layout, context.own, context.own)
        """[num_pages, l, 2, k, H]: what of each page this session carries, if `_part_bytes` is not 0."""
        self._part_bytes = context.pages.page_bytes
        self._context = context
        self._on_closed = on_closed
        self._wire: Wire | None = None
        self._offer: ShmOffer | None = None
        self._greeted = False
        self._mode: str | None = None
        self._heartbeat: Heartbeat | None = None
        self._jobs: asyncio.Queue[SendJob | None] = asyncio.Queue()
        limit_s = context.config.connect_timeout_s
        self._hello_timer = context.timers.call_later(limit_s, lambda: self._hello_late(limit_s))

    def attach(self, wire: Wire) -> None:
        """The session's connection; frames must not come before this."""
        self._wire = wire

    # PrefillPeer

    def enqueue(self, job: SendJob) -> None:
        self._jobs.put_nowait(job)

    def cancel(self, transfer_id: int, reason: str) -> None:
        self._send(Cancel(transfer_id, reason))

    def drop(self, reason: str) -> None:
        if self._wire is not None:
            self._wire.fail(reason)

    # Frames

    def on_frame(self, frame: Frame) -> None:
        if self._heartbeat is not None:
            self._heartbeat.seen()
        rooms = self._context.rooms
        if self._mode is None:
            self._handshake(frame)
        elif isinstance(frame, Notice):
            rooms.notice(self, frame.transfer_id, frame.room, frame.first_page_idx, frame.num_pages)
        elif isinstance(frame, Ack):
            rooms.ack(self, frame.transfer_id)
        elif isinstance(frame, Cancel):
            rooms.cancel(self, frame.transfer_id, frame.reason)
        elif isinstance(frame, Cancelled):
            rooms.cancelled(self, frame.transfer_id)
        elif isinstance(frame, Ping):
            self._send(Pong())
        elif not isinstance(frame, Pong):
            raise TransferError(f"unexpected {type(frame).__name__} from a decode side")

    def on_lost(self, reason: str) -> None:
        log.info("decode session ended", extra={"peer": self.name, "reason": reason})
        self._hello_timer.cancel()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._offer is not None and self._context.shm is not None:
            self._context.shm.withdraw(self._offer)
        # The pump is not cancelled: it must outlive the summing that is under way in its room, then it ends by itself.
        self._jobs.put_nowait(None)
        self._context.rooms.lost(self, reason)
        self._on_closed(self)

    def _handshake(self, frame: Frame) -> None:
        if isinstance(frame, Hello) and not self._greeted:
            self._greeted = True
            self.name = f"{frame.name[:100]} ({self.name})"
            if refusal := self._refusal(frame):
                self._send(refusal)
                raise TransferError(refusal.message)
            self._carry(frame)
            if self._context.shm is not None:
                self._offer = self._context.shm.offer()
            self._send(Welcome(self._offer))
        elif isinstance(frame, Mode) and self._greeted:
            if frame.kind == "shm" and self._offer is None:
                raise TransferError("shared memory was not offered")
            self._start(frame.kind)
        else:
            raise TransferError(f"{type(frame).__name__} in the middle of the hello")

    def _refusal(self, hello: Hello) -> Refuse | None:
        if hello.version != PROTOCOL_VERSION:
            text = f"transfer protocol differs: prefill has {PROTOCOL_VERSION}, decode has {hello.version}"
            return Refuse("version", text)
        if (mismatch := layout_mismatch(self._context.layout, hello.layout)) is not None:
            return Refuse(*mismatch)
        if hello.part is not None and not hello.part.is_empty and self._context.own.overlap(hello.part) != hello.part:
            return Refuse(
                "part", f"this prefill rank holds {self._context.own} of a page, decode asks for {hello.part}"
            )
        if hello.num_takers < 1:
            return Refuse("num_takers", f"num_takers must be at least 1, got {hello.num_takers}")
        return None

    def _carry(self, hello: Hello) -> None:
        context = self._context
        part = context.own if hello.part is None else hello.part
        self.worker, self.num_takers = hello.worker, hello.num_takers
        self._sends_token = context.leads and hello.rank == 0
        self._part_bytes = slice_bytes(context.layout, part)
        if self._part_bytes:
            self._part = part_of_pages(context.pages.array, context.layout, context.own, part)

    def _start(self, mode: str) -> None:
        assert self._wire is not None
        config = self._context.config
        self._hello_timer.cancel()
        self._mode = mode
        self._wire.max_frame_bytes = config.max_frame_bytes
        self._heartbeat = Heartbeat(
            self._context.timers,
            config.heartbeat_interval_s,
            config.heartbeat_max_failure,
            ping=lambda: self._send(Ping()),
            dead=self.drop,
        )
        self._context.thread.start(self._pump(), f"pump {self.name}")
        log.info("decode session started", extra={"peer": self.name, "mode": mode})

    def _hello_late(self, limit_s: float) -> None:
        self.drop(f"no hello within {limit_s:g} s")

    def _send(self, frame: Frame) -> None:
        if self._wire is not None:
            self._wire.send(frame)

    # Pages

    async def _pump(self) -> None:
        """Hand over one `send` after the other. A job that fails costs its room, never the pump."""
        rooms = self._context.rooms
        while (job := await self._jobs.get()) is not None:
            if not rooms.begin(job.room):
                continue
            try:
                await self._hand_over(job)
            except TransferError as error:
                rooms.fail(job.room, broken(str(error)))
            except Exception as error:  # A bug of ours: reported as the room's end.
                log.exception("hand-over failed", extra={"room": job.room.room})
                rooms.fail(job.room, broken(f"internal error: {error!r}"))
            finally:
                rooms.done(job.room)

    async def _hand_over(self, job: SendJob) -> None:
        """Returns early when the room is given up; at most one page is sent after that."""
        state = job.room
        if self._part_bytes:
            await (self._announce(job) if self._mode == "shm" else self._send_pages(job))
        if job.first_token is not None and state.failure is None:
            token = job.first_token if self._sends_token else None
            self._send_last(Last(state.transfer_id, state.num_pages if self._part_bytes else 0, token))

    async def _announce(self, job: SendJob) -> None:
        """Shared memory: the decode side copies the pages itself."""
        state = job.room
        async with aclosing(self._ahead(job, checksum_pages)) as groups:
            async for first_idx, page_ids, sums in groups:
                self._send(Chunk(state.transfer_id, first_idx, list(page_ids), sums))
                state.num_bytes += len(page_ids) * self._part_bytes

    async def _send_pages(self, job: SendJob) -> None:
        assert self._wire is not None
        state = job.room
        async with aclosing(self._ahead(job, sum_pages)) as groups:
            async for first_idx, _, pages in groups:
                for page_idx, page in enumerate(pages, first_idx):
                    if state.failure is not None:
                        return
                    await self._wire.send_page(Page(state.transfer_id, page_idx, page.checksum), page.body.data)
                    state.num_bytes += self._part_bytes

    def _send_last(self, last: Last) -> None:
        num_bytes = len(msgspec.msgpack.encode(last))
        if num_bytes > self._context.config.max_frame_bytes:
            limit = self._context.config.max_frame_bytes
            raise TransferError(f"metadata of {num_bytes} bytes (log-probabilities) is over the limit of {limit}")
        self._send(last)

    async def _ahead(
        self, job: SendJob, work: Callable[[NDArray[np.uint8], Sequence[int], Stopped], list[T] | None]
    ) -> AsyncGenerator[tuple[int, Sequence[int], list[T]], None]:
        """Groups of pages (first index, ids, what `work` makes of them), worked on ahead on the copy thread. Ends early when the room is
        given up. When it is closed, no work goes on."""
        state = job.room
        groups = _groups(len(job.page_ids), max(1, self._context.config.chunk_bytes // self._part_bytes))
        ahead: deque[tuple[int, Sequence[int], asyncio.Future[list[T] | None]]] = deque()
        try:
            while True:
                while len(ahead) <= _NUM_GROUPS_AHEAD and (group := next(groups, None)) is not None:
                    page_ids = job.page_ids[group]
                    call = partial(work, self._part, page_ids, lambda: state.failure is not None)
                    ahead.append((job.first_page_idx + group.start, page_ids, self._context.thread.copy(call)))
                if not ahead:
                    return
                first_idx, page_ids, future = ahead[0]
                results = await future
                ahead.popleft()
                if results is None:
                    return
                yield first_idx, page_ids, results
        finally:
            if ahead:
                await asyncio.wait([future for _, _, future in ahead])


def _groups(num_pages: int, largest: int) -> Iterator[slice]:
    """Consecutive slices of `num_pages`: 1, 2, 4, ... pages, up to `largest`."""
    start, size = 0, 1
    while start < num_pages:
        yield slice(start, min(start + size, num_pages))
        start, size = start + size, min(2 * size, largest)
