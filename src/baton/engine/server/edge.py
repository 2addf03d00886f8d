"""A worker's side of one HTTP connection: uvicorn's, with the limits that uvicorn does not have.

uvicorn bounds neither the head of a request nor how long one may take to arrive, so a client that sends headers without
end, or one byte a minute, would hold memory and a descriptor for ever. The router has the same limits (`router.downstream`);
the size of bodies is `intake`'s.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10
"""URL, headers and trailers of one request."""
READ_TIMEOUT_S = 60.0
"""A head must have arrived this long after the connection or its first byte; a body may not pause for longer."""


class HeadTooLargeError(Exception):
    """Raised in a parser callback; the parser turns it into its own error."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """Invariant: `_timer` runs while the client owes us bytes: a first request, or the rest of one that began."""

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0
    _unreported = 0
    """Bytes since the parser last called back; it keeps them, as part of a header that has not ended."""
    _last_read_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(READ_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._last_read_s = self.loop.time()
        self._unreported += len(data)
        super().data_received(data)
        if self._unreported > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif not self.transport.is_closing():
            self._refuse(400, "BadRequestError", msg)

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        if self._timer is None:
            self._arm(READ_TIMEOUT_S)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unreported = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unreported = 0
        self._disarm()
        super().on_message_complete()

    # Limits

    def _count(self, num_bytes: int) -> None:
        self._unreported = 0
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLargeError

    def _arm(self, delay_s: float) -> None:
        self._timer = self.loop.call_later(delay_s, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        pause_s = READ_TIMEOUT_S if self._in_head else self.loop.time() - self._last_read_s
        if self.flow.read_paused or pause_s < READ_TIMEOUT_S:  # it is we who do not read, or the body is coming
            self._arm(READ_TIMEOUT_S - pause_s if pause_s < READ_TIMEOUT_S else READ_TIMEOUT_S)
        elif self._in_head and self._last_read_s:
            self._refuse(408, "RequestTimeoutError", f"the request did not arrive within {READ_TIMEOUT_S:g} seconds.")
        else:
            self.transport.close()  # nothing was asked; or the handler reads a body, and hears that the client is gone

    def _refuse_head(self) -> None:
        message = f"the request's headers are larger than the limit of {MAX_HEAD_BYTES} bytes."
        self._refuse(431, "HeadersTooLargeError", message)

    def _refuse(self, status: int, kind: str, message: str) -> None:
        error: dict[str, Any] = {
            "type": kind,
            "code": status,
            "message": message,
            "stage": "server",
            "retryable": False,
        }
        body = json.dumps({"error": error}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        if not self._in_head and self.cycle is not None and self.cycle.response_started:
            self.transport.close()  # too late for another answer on this connection
            return
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
