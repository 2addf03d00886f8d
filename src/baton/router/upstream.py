"""Connections to workers: HTTP/1.1 over raw asyncio protocols, kept alive in one pool per worker.

A connection serves one request at a time and tells its `Listener` what comes: a head, body bytes, the end, or that the
connection was lost. Nothing is retried here; nothing is known of prefill or decode.
"""

import asyncio
import socket
from typing import Protocol, cast

import httptools

IDLE_S = 4.0
"""Idle connections older than this are not used again: common servers close theirs after 5 s."""
MAX_IDLE = 1024


class Listener(Protocol):
    """Who gets a response. Exactly one of `on_end` and `on_lost` comes last."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def on_data(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_lost(self, reason: str, stale: bool) -> None:
        """`stale`: a reused connection was closed before any byte of the answer: the worker never took the request."""


class Upstream(asyncio.Protocol):
    """One connection. Owned by its pool while idle, by its listener's attempt while busy."""

    __slots__ = (
        "_body",
        "_complete",
        "_got_bytes",
        "_head_ready",
        "_headers",
        "_keep_alive",
        "_listener",
        "_parser",
        "_paused",
        "_pool",
        "_reused",
        "idle_since_s",
        "transport",
    )

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._listener: Listener | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._head_ready = False
        self._complete = False
        self._keep_alive = False
        self._got_bytes = False
        self._reused = False
        self._paused = False
        self.idle_since_s = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but type
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, head: bytes, body: bytes, listener: Listener) -> None:
        """Start an exchange; the connection must be idle."""
        assert self._listener is None
        self._listener = listener
        self._got_bytes = False
        if self.transport is None or self.transport.is_closing():  # the worker closed it since it was picked
            self._reused = True
            asyncio.get_running_loop().call_soon(self.connection_lost, None)
        elif len(body) < 65536:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)

    def close(self) -> None:
        """Drop the exchange, if any, and the connection; the listener hears nothing more."""
        self._listener = None
        if self.transport is not None:
            self.transport.abort()

    def pause(self) -> None:
        if not self._paused and self.transport is not None and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.transport is not None and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    # What the parser finds; delivered by `data_received` once per read.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._head_ready = True

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # 1xx: the real head is still to come
            self._headers = []
            self._head_ready = False
        else:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()  # known here only

    def data_received(self, data: bytes) -> None:
        listener = self._listener
        if listener is None:  # an answer nobody asked for
            self.close()
            return
        self._got_bytes = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("the worker wants to change the protocol")
            return
        except httptools.HttpParserError as error:
            self._fail(f"the worker's answer is not HTTP: {error}")
            return
        if self._head_ready:
            self._head_ready = False
            headers, self._headers = self._headers, []
            listener.on_head(self._parser.get_status_code(), headers)
        if self._body:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body = []
            if self._listener is listener:
                listener.on_data(body)
        if self._complete:
            self._complete = False
            if self._listener is listener:
                self._listener = None
                if self._keep_alive:
                    self.resume()
                    self._pool.put(self)
                else:
                    self.close()
                listener.on_end()

    def _fail(self, reason: str) -> None:
        listener = self._listener
        self.close()
        if listener is not None:
            listener.on_lost(reason, False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.discard(self)
        self.transport = None
        listener, self._listener = self._listener, None
        if listener is not None:
            reason = str(exc) if exc else "connection closed before the end of the answer"
            listener.on_lost(reason, self._reused and not self._got_bytes)

    def take(self) -> None:
        """Leave the pool for a new exchange."""
        self._reused = True


class Pool:
    """Idle connections to one worker, newest first. `get_idle` never waits; `connect` opens a new one."""

    def __init__(self, host: str, port: int, connect_timeout_s: float) -> None:
        self._host = host
        self._port = port
        self._timeout_s = connect_timeout_s
        self._idle: list[Upstream] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def get_idle(self) -> Upstream | None:
        idle = self._idle
        while idle:
            connection = idle.pop()
            assert self._loop is not None
            transport = connection.transport
            if transport is None or transport.is_closing():
                continue
            if self._loop.time() - connection.idle_since_s <= IDLE_S:
                connection.take()
                return connection
            connection.close()
        return None

    async def connect(self) -> Upstream:
        """Raises OSError (refused, unreachable, name unknown) or TimeoutError."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        async with asyncio.timeout(self._timeout_s):
            _, protocol = await loop.create_connection(lambda: Upstream(self), self._host, self._port)
        return protocol

    def put(self, connection: Upstream) -> None:
        if self._closed or len(self._idle) >= MAX_IDLE or self._loop is None:
            connection.close()
            return
        connection.idle_since_s = self._loop.time()
        self._idle.append(connection)

    def discard(self, connection: Upstream) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close idle connections; busy ones close when their exchange ends."""
        self._closed = True
        for connection in list(self._idle):
            connection.close()
        self._idle.clear()


class Collector:
    """A `Listener` that gathers a whole small answer, for the router's own calls."""

    def __init__(self, limit_bytes: int) -> None:
        self.answer: asyncio.Future[tuple[int, list[tuple[bytes, bytes]], bytes]] = (
            asyncio.get_running_loop().create_future()
        )
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._left = limit_bytes

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status, self._headers = status, headers

    def on_data(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left >= 0:
            self._body.append(data)

    def on_end(self) -> None:
        if self.answer.done():
            return
        if self._left < 0:
            self.answer.set_exception(ConnectionError("the worker's answer is too large"))
        else:
            self.answer.set_result((self._status, self._headers, b"".join(self._body)))

    def on_lost(self, reason: str, stale: bool) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionError(reason))
