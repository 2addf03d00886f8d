"""The client's side: one raw HTTP/1.1 connection, requests in order, answers written by the app.

Owns limits and time-outs of reading (sizes, slow senders, idle keep-alive), `Expect: 100-continue`, pipelining (later
requests wait, reading stops) and HTTP/1.0. Knows nothing of routes or workers: a whole request goes to `App.on_request`.
"""

import asyncio
import socket
from collections import deque
from typing import Protocol, cast
from urllib.parse import unquote

import httptools

from baton.protocol.errors import RequestError
from baton.router.config import LimitsConfig
from baton.router.errors import router_error
from baton.router.httpbytes import chunk, response_head

MAX_PIPELINED = 64


class Request:
    """One whole request. `headers` has lower-case names; of a repeated header the last value counts."""

    __slots__ = (
        "body",
        "connection",
        "exchange",
        "headers",
        "method",
        "path",
        "received_s",
        "request_id",
        "request_id_is_ours",
    )

    def __init__(
        self, connection: "ClientConnection", method: bytes, path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> None:
        self.connection = connection
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.received_s = 0.0
        self.request_id = ""
        self.request_id_is_ours = False
        self.exchange: Disconnectable | None = None

    @property
    def text_path(self) -> str:
        return unquote(self.path.decode("latin-1"))


class Disconnectable(Protocol):
    """Who must hear that the client is gone, or reads slowly."""

    def on_disconnect(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class App(Protocol):
    limits: LimitsConfig
    connections: set["ClientConnection"]
    closing: bool

    def on_request(self, request: Request) -> None: ...
    def on_bad_request(self, connection: "ClientConnection", error: RequestError) -> None: ...


class ClientConnection(asyncio.Protocol):
    """At most one request is being answered (`current`); `_waiting` holds pipelined ones."""

    def __init__(self, app: App, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._in_message = False
        self._head_done = False
        self._began_s = 0.0
        self._keep_alive = True
        self._refused = False
        self._chunked_out = False
        self.current: Request | None = None
        self.http10 = False
        self.transport: asyncio.Transport | None = None
        self.since_s = loop.time()
        """Last time something was read or an answer ended; `sweep` measures from here."""
        self.bytes_out = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but type
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._app.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._app.connections.discard(self)
        self.transport = None
        self._waiting.clear()
        current, self.current = self.current, None
        if current is not None and current.exchange is not None:
            current.exchange.on_disconnect()

    def pause_writing(self) -> None:
        if self.current is not None and self.current.exchange is not None:
            self.current.exchange.pause()

    def resume_writing(self) -> None:
        if self.current is not None and self.current.exchange is not None:
            self.current.exchange.resume()

    # Reading

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self.since_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(router_error(400, "Protocol upgrades are not supported."))
        except RequestError as error:
            self._refuse(error)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, RequestError) else router_error(400, f"Bad HTTP request: {error}."))
        except httptools.HttpParserError as error:
            self._refuse(router_error(400, f"Bad HTTP request: {error}."))
        else:
            if self._in_message and not self._head_done:
                self._head_bytes += len(data)
                if self._head_bytes > self._app.limits.max_header_bytes:
                    self._refuse(self._header_error())

    def _header_error(self) -> RequestError:
        return router_error(
            431, f"The request's headers are larger than the limit of {self._app.limits.max_header_bytes} bytes."
        )

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = {}
        self._body = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._in_message = True
        self._head_done = False
        self._began_s = self.since_s

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        headers = self._headers
        self._head_done = True
        self._head_bytes = 0
        if (
            sum(map(len, headers)) + sum(map(len, headers.values())) + len(self._url)
            > self._app.limits.max_header_bytes
        ):
            raise self._header_error()
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._app.limits.max_payload_bytes:
            raise self._size_error()
        if b"upgrade" in headers and (length is not None or b"transfer-encoding" in headers):
            # The parser would take the body for the other protocol; without a body the wish is simply not granted.
            raise router_error(400, "Protocol upgrades are not supported; send the request without the Upgrade header.")
        if b"expect" in headers:
            if headers[b"expect"].lower() != b"100-continue":
                raise router_error(417, "The only expectation supported is 100-continue.")
            if self.current is None and self.transport is not None and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _size_error(self) -> RequestError:
        limit = self._app.limits.max_payload_bytes
        return router_error(413, f"The request body is larger than the limit of {limit} bytes (--max-payload-size).")

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > self._app.limits.max_payload_bytes:
            raise self._size_error()
        self._body.append(data)

    def on_message_complete(self) -> None:
        self._in_message = False
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        path = self._url.partition(b"?")[0]
        if not path.startswith(b"/"):
            path = httptools.parse_url(self._url).path or b"/"
        request = Request(self, self._parser.get_method(), path, self._headers, body)
        keep_alive = self._parser.should_keep_alive()
        http10 = self._parser.get_http_version() == "1.0"
        if self.current is None:
            self._start(request, keep_alive, http10)
            return
        if len(self._waiting) >= MAX_PIPELINED:
            raise router_error(400, f"More than {MAX_PIPELINED} pipelined requests.")
        request.exchange = None
        self._waiting.append((request, keep_alive))
        if self.transport is not None:
            self.transport.pause_reading()

    def _start(self, request: Request, keep_alive: bool, http10: bool) -> None:
        self.current = request
        self._keep_alive = keep_alive
        self.http10 = http10
        self.bytes_out = 0
        request.received_s = self._loop.time()
        self._app.on_request(request)

    def _refuse(self, error: RequestError) -> None:
        """Answer a request that cannot be read, after the one in progress has ended; then close."""
        self._refused = True
        self._waiting.clear()
        self._keep_alive = False
        if self.current is None:
            self._app.on_bad_request(self, error)

    def sweep(self, now_s: float) -> None:
        """Close when the client is too slow, or idle for too long."""
        limits = self._app.limits
        if self.current is not None:
            return
        if self._in_message:
            # A head must be there whole in time; a body may take long as long as it comes.
            if now_s - (self.since_s if self._head_done else self._began_s) > limits.read_timeout_s:
                self._refuse(router_error(408, f"The request did not arrive within {limits.read_timeout_s:g} seconds."))
        elif now_s - self.since_s > limits.keep_alive_s or self._app.closing:
            self.close()

    # Writing

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """A whole answer. `headers` are lines, each ended by CRLF, without length and connection."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        self.bytes_out = len(body)
        keep = self._keep_alive and not self._app.closing
        head = response_head(status, headers, len(body), keep, self.http10)
        if self.current is not None and self.current.method == b"HEAD":
            transport.write(head)
        elif len(body) < 65536:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        self._finish(keep)

    def start_stream(self, status: int, headers: bytes, first: bytes) -> None:
        """Head and first bytes of an answer of unknown length."""
        if self.transport is None or self.transport.is_closing():
            return
        self._chunked_out = not self.http10
        if self.http10:
            self._keep_alive = False
        head = response_head(status, headers, None, self._keep_alive, self.http10)
        self.bytes_out = len(first)
        self.transport.write(head + (chunk(first) if self._chunked_out else first))

    def write(self, data: bytes) -> None:
        """More bytes of a stream."""
        if self.transport is not None and not self.transport.is_closing():
            self.bytes_out += len(data)
            self.transport.write(chunk(data) if self._chunked_out else data)

    def end_stream(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if self._chunked_out:
            self.transport.write(b"0\r\n\r\n")
        self._finish(self._keep_alive and not self._app.closing)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def _finish(self, keep: bool) -> None:
        self.current = None
        self.since_s = self._loop.time()
        if not keep:
            self.close()
        elif self._waiting:
            request, keep_alive = self._waiting.popleft()
            if not self._waiting and self.transport is not None:
                self.transport.resume_reading()
            self._start(request, keep_alive, self.http10)
