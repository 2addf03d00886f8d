"""One connected stream socket on the transfer's event loop: frames both ways, page bodies straight into or out of pages.

asyncio's own transports copy what they cannot send at once; a page is 0.3 to 1 MiB, so this class talks to the socket
itself: `sendmsg` of memory views out, `recvmsg_into` with the page's memory as the first target in. What a frame means is
the session's business.
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice

from baton.transfer.errors import TransferError
from baton.transfer.frames import HANDSHAKE_FRAME_BYTES, LENGTH_BYTES, Frame, decode, encode

log = logging.getLogger(__name__)

_READ_BYTES = 4096
"""Small on purpose: at most this much of a page body passes through the buffer instead of landing in its page."""
_READ_ON_BYTES = 8 << 20
_MAX_BUFFERS = 16


class Wire:
    """Owns the socket. `on_lost(reason)` is called exactly once, when the connection ends for any reason but `close`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_frame: Callable[[Frame], None],
        on_lost: Callable[[str], None],
    ) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.max_frame_bytes = HANDSHAKE_FRAME_BYTES
        """Raised by the session when the peer is known."""
        self._sock = sock
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._loop = loop
        self._closed = False
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._start = self._end = 0  # Unparsed bytes of _buffer.
        self._sink: memoryview | None = None  # What is still missing of a body or a large frame.
        self._sink_done: Callable[[], None] = _nothing
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._drained: asyncio.Future[None] | None = None
        self._loop.add_reader(sock, self._on_readable)

    @property
    def closed(self) -> bool:
        return self._closed

    # Sending

    def send(self, frame: Frame) -> None:
        """Queue a frame; never blocks, does nothing on a closed wire. A peer that reads nothing loses the connection."""
        if self._closed:
            return
        self._queue(encode(frame))
        if self._out_bytes > 4 * max(self.max_frame_bytes, HANDSHAKE_FRAME_BYTES):
            self.fail("the peer does not read its messages")
            return
        self._flush()

    async def send_page(self, frame: Frame, body: memoryview) -> None:
        """Send a frame and its body; returns when the kernel has all of it, so `body` is free again.

        Raises `TransferError` when the connection ends first (then nothing reads `body` any more either)."""
        if not self._closed:
            self._queue(encode(frame))
            self._queue(body)
            self._flush()
        if self._closed:
            raise TransferError("connection closed")
        if self._out:
            self._drained = self._loop.create_future()
            await self._drained

    def _queue(self, data: bytes | memoryview) -> None:
        self._out.append(memoryview(data))
        self._out_bytes += len(data)

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self._sock.sendmsg(list(islice(self._out, _MAX_BUFFERS)))
                self._out_bytes -= sent
                while sent:
                    head = self._out[0]
                    if sent < len(head):
                        self._out[0] = head[sent:]
                        break
                    sent -= len(head)
                    self._out.popleft()
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self._sock, self._flush)
            return
        except OSError as error:
            self.fail(f"connection broken: {error}")
            return
        self._loop.remove_writer(self._sock)
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    # Receiving

    def read_into(self, target: memoryview, done: Callable[[], None]) -> None:
        """The next len(target) bytes of the stream belong in `target` (not empty); then `done()`. Call from `on_frame`."""
        self._sink, self._sink_done = target, done

    def divert(self, scratch: memoryview) -> None:
        """Stop writing to the present `read_into` target: the rest of it goes into `scratch` (as large as the target)."""
        if self._sink is not None:
            self.read_into(scratch[: len(self._sink)], _nothing)

    def _on_readable(self) -> None:
        """Read on while a body is coming, up to a limit: a trip through the event loop costs as much as a small read."""
        budget = _READ_ON_BYTES
        try:
            while budget > 0 and not self._closed:
                count = self._receive()
                if count == 0:
                    raise TransferError("connection closed by the peer")
                self._parse()
                budget = budget - count if self._sink is not None else 0
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.fail(f"connection broken: {error}")
        except TransferError as error:
            self.fail(str(error))
        except Exception as error:  # A bug of ours in a handler: reported here, costs this session and not the thread.
            log.exception("transfer session failed")
            self.fail(f"internal error: {error!r}")

    def _receive(self) -> int:
        space = self._buffer[self._end :]
        if self._sink is None:
            count = self._sock.recv_into(space)
            self._end += count
            return count
        count = self._sock.recvmsg_into([self._sink, space])[0]
        in_sink = min(count, len(self._sink))
        self._sink = self._sink[in_sink:]
        self._end += count - in_sink
        return count

    def _parse(self) -> None:
        while not self._closed:
            if self._sink is not None:
                taken = min(len(self._sink), self._end - self._start)
                self._sink[:taken] = self._buffer[self._start : self._start + taken]
                self._start += taken
                self._sink = self._sink[taken:]
                if self._sink:
                    break
                self._sink = None
                self._sink_done()
            elif not self._parse_frame():
                break
        if self._start:
            rest = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)

    def _parse_frame(self) -> bool:
        """Handle the frame at the start of the buffer; False when more bytes are needed first."""
        present = self._end - self._start - LENGTH_BYTES
        if present < 0:
            return False
        body = self._start + LENGTH_BYTES
        length = int.from_bytes(self._buffer[self._start : body], "little")
        if length > self.max_frame_bytes:
            raise TransferError(f"frame of {length} bytes is over the limit of {self.max_frame_bytes}")
        if length <= present:
            self._start = body + length
            self._on_frame(decode(bytes(self._buffer[body : body + length])))
            return True
        if length + LENGTH_BYTES <= _READ_BYTES:
            return False
        large = bytearray(length)
        self._start = body
        self.read_into(memoryview(large), lambda: self._on_frame(decode(large)))
        return True

    # The end

    def fail(self, reason: str) -> None:
        """End the connection and tell the session why. Later calls do nothing."""
        if not self._closed:
            self.close()
            self._on_lost(reason)

    def close(self) -> None:
        """End the connection: nothing reads or writes any page through this wire afterwards."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._out.clear()
        self._sink = None
        self._sink_done = _nothing
        if self._drained is not None:
            self._drained.set_exception(TransferError("connection closed"))
            self._drained = None


def _nothing() -> None:
    pass
