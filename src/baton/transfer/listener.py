"""A listening socket on the transfer's event loop that never loses an accepted connection.

`loop.sock_accept` can: when it is cancelled just after a connection came, nobody owns that connection any more.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

log = logging.getLogger(__name__)

_PAUSE_S = 0.2


class Listener:
    """Owns the socket. `on_connection` gets each connection and owns it; it must not raise."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, on_connection: Callable[[socket.socket], None]
    ) -> None:
        """Call on the loop."""
        sock.setblocking(False)
        self._loop, self._sock, self._on_connection = loop, sock, on_connection
        self._closed = False
        self._resume()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:  # Out of descriptors: the socket stays readable, so look again a little later.
            log.warning("cannot accept a connection", extra={"reason": str(error)})
            self._loop.remove_reader(self._sock)
            self._loop.call_later(_PAUSE_S, self._resume)
            return
        self._on_connection(connection)
