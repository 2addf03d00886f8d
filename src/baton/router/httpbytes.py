"""Bytes of HTTP/1.1 heads and chunks. No sockets."""

from http import HTTPStatus

from baton.protocol.hops import REQUEST_ID_HEADER, TIMEOUT_HEADER, TOKEN_IDS_HEADER

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
_HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
        b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server", b"x-request-id",
    )
)  # fmt: skip
_FORWARDED = (b"authorization", b"accept", b"traceparent", b"tracestate", b"accept-language", b"user-agent")
_OWN = frozenset(name.encode() for name in (REQUEST_ID_HEADER, TIMEOUT_HEADER, TOKEN_IDS_HEADER))
JSON_TYPE = b"content-type: application/json\r\n"
TEXT_TYPE = b"content-type: text/plain; charset=utf-8\r\n"


def status_line(status: int) -> bytes:
    line = _STATUS_LINES.get(status)
    return line if line is not None else b"HTTP/1.1 %d Unknown\r\n" % status


def response_head(status: int, headers: bytes, length: int | None, keep_alive: bool, http10: bool) -> bytes:
    """A head with its blank line; `length` None: chunked (HTTP/1.0: until the connection closes)."""
    if length is not None:
        framing = b"content-length: %d\r\n" % length
    else:
        framing = b"" if http10 else b"transfer-encoding: chunked\r\n"
    if keep_alive:
        connection = b"connection: keep-alive\r\n\r\n" if http10 else b"\r\n"
    else:
        connection = b"connection: close\r\n\r\n"
    return status_line(status) + headers + framing + connection


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def passed_on(headers: list[tuple[bytes, bytes]], request_id: str) -> bytes:
    """Header lines of a worker's answer for the client, with the request's id."""
    lines = [b"%b: %b\r\n" % (name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]
    lines.append(b"x-request-id: %b\r\n" % request_id.encode())
    return b"".join(lines)


def forwarded(headers: dict[bytes, bytes]) -> bytes:
    """Header lines of a client's request for a worker: authorization, tracing, and unknown x- ones."""
    lines = [b"%b: %b\r\n" % (name, headers[name]) for name in _FORWARDED if name in headers]
    for name in headers:
        if name.startswith(b"x-") and name not in _OWN:
            lines.append(b"%b: %b\r\n" % (name, headers[name]))
    return b"".join(lines)


def header(headers: list[tuple[bytes, bytes]], wanted: bytes) -> bytes:
    """The value of a header, or nothing."""
    for name, value in headers:
        if len(name) == len(wanted) and name.lower() == wanted:
            return value
    return b""
