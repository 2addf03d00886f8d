"""A TCP proxy for one Service: its address and ports in front, its ready endpoints behind, round robin.

Bytes are relayed by the event loop with back-pressure both ways. An endpoint that refuses is skipped and the next one
tried; a connection is refused (closed) when no endpoint takes it within the deadline. A connection in progress stays with
its endpoint when the set changes, as with kube-proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from dataclasses import dataclass

log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 4096
BACKLOG = 1024
RELAY_BYTES = 65536
_LINGER_NONE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Frontend:
    """Where a Service listens."""

    address: str
    port: int


class Proxy:
    """One listening port. `set_backends` may be called at any time."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self._backends: tuple[tuple[str, int], ...] = ()
        self._next = 0
        self._listener: socket.socket | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._fresh: set[socket.socket] = set()
        """Accepted, and their task has not begun: cancelled now, it never would close them."""

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((self.frontend.address, self.frontend.port))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        # Accepted in a callback: a task that waits for a connection can be cancelled with one in its hands, which then
        # stays open and mute (asyncio's own server strands it likewise).
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def stop(self) -> None:
        """Stop listening and cut what runs."""
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        for connection in self._fresh:
            connection.close()

    def set_backends(self, backends: tuple[tuple[str, int], ...]) -> None:
        self._backends = backends

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # a client that went at once, or no descriptor left: the loop comes back
            log.warning("cannot accept", extra={"error": str(error)})
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._fresh.add(connection)
        task = asyncio.create_task(self._handle(connection), name="relay")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _handle(self, connection: socket.socket) -> None:
        self._fresh.discard(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader, writer = await asyncio.open_connection(sock=connection, limit=RELAY_BYTES)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await self._connect()
        if upstream is None:
            # So that the client sees a failed connection and not an empty answer.
            _reset(writer)
            return
        up_reader, up_writer = upstream
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_relay(reader, up_writer))
                group.create_task(_relay(up_reader, writer))
        except* OSError:
            # One side broke: the other must see a broken connection too, not a clean end.
            for one in (writer, up_writer):
                _reset(one)
        finally:
            for one in (writer, up_writer):
                one.close()
                with contextlib.suppress(OSError):
                    await one.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to the next endpoint that takes one."""
        backends = self._backends
        start, self._next = self._next, self._next + 1
        for step in range(len(backends)):
            host, port = backends[(start + step) % len(backends)]
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    return await asyncio.open_connection(host, port, limit=RELAY_BYTES)
            except (OSError, TimeoutError) as error:
                log.debug("endpoint does not answer", extra={"endpoint": f"{host}:{port}", "error": str(error)})
        return None


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: the peer gets an error, not an end of file."""
    one = writer.get_extra_info("socket")
    if one is not None:
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    writer.transport.abort()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end of the one side, then half-close the other."""
    while data := await reader.read(RELAY_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
