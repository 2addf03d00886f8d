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
from dataclasses import dataclass

log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 4096
RELAY_BYTES = 65536


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
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        self._server = await asyncio.start_server(
            self._accept, self.frontend.address, self.frontend.port, family=socket.AF_INET, backlog=1024,
            limit=RELAY_BYTES,
        )  # fmt: skip

    async def stop(self) -> None:
        """Stop listening and cut what runs."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def set_backends(self, backends: tuple[tuple[str, int], ...]) -> None:
        self._backends = backends

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await self._connect()
        if upstream is None:
            # A reset, so that the client sees a failed connection and not an empty answer.
            writer.transport.abort()
            return
        up_reader, up_writer = upstream
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_relay(reader, up_writer))
                group.create_task(_relay(up_reader, writer))
        except* OSError:
            # One side broke: the other must see a broken connection too, not a clean end.
            for one in (writer, up_writer):
                one.transport.abort()
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


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end of the one side, then half-close the other."""
    while data := await reader.read(RELAY_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
